"""What `serve_load.py` puts under load, and clients: such as wait for answers, and such as misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHAT = "/v1/chat/completions"
ODD = ("vanishes", "malformed", "huge", "slow")


@dataclass(slots=True)
class Row:
    """One request and what came of it; `late` in seconds, 0 where it was in time."""

    status: str
    budget: float
    late: float = 0.0
    answered: bool = False
    samples: int = 0
    retry: float = 0.0


class Server:
    """The process under test, and where it listens."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        self._errors = log.open("w")
        self.process = subprocess.Popen(command, stderr=self._errors, text=True)
        self.host, self.port = "", 0

    async def find(self) -> None:
        """Waits until it is ready."""
        while self.process.poll() is None:
            line = next((line for line in self._log.read_text().splitlines() if '"serving"' in line), None)
            if line is not None:
                self.host, port = str(json.loads(line)["address"]).removeprefix("http://").split(":")
                self.port = int(port)
                try:
                    if (await Connection(self).get("/ready"))[0] == 200:
                        return
                except OSError:
                    pass
            await asyncio.sleep(0.05)
        raise SystemExit(f"the server did not start: {self._log.read_text()}")

    def cpu(self) -> float:
        """Processor seconds so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._errors.close()


class Connection:
    """HTTP/1.1 with next to nothing: the clients should leave the machine to the server."""

    def __init__(self, server: Server, limit: int = 1 << 16) -> None:
        self._server, self._limit = server, limit
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.reader is None or self.writer is None or self.reader.at_eof() or self.writer.is_closing():
            where = self._server.host, self._server.port
            self.reader, self.writer = await asyncio.open_connection(*where, limit=self._limit)
        return self.reader, self.writer

    async def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Sends a request and reads the whole answer: status, headers, body."""
        reader, writer = await self.open()
        writer.write(request)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return int(head[0].split()[1]), headers, body

    async def get(self, path: str) -> tuple[int, bytes]:
        status, _, body = await self.ask(f"GET {path} HTTP/1.1\r\nHost: load\r\n\r\n".encode())
        return status, body

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


def post(body: bytes, *more: str) -> bytes:
    """A request with this body and maybe more headers."""
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: load\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def chat(name: str, problem: str, budget: float, **more: Any) -> bytes:
    """A request for the best answer within a budget."""
    messages = [{"role": "user", "content": problem}]
    body = {"model": name, "messages": messages, "temperature": 0.8, "time_budget": budget, **more}
    return post(json.dumps(body).encode())


async def one(connection: Connection, request: bytes, budget: float) -> Row:
    """Asks once."""
    asked = time.monotonic()
    try:
        status, headers, body = await connection.ask(request)
    except (OSError, asyncio.IncompleteReadError) as error:
        connection.close()
        return Row(type(error).__name__, budget)
    row = Row(str(status), budget, max(0.0, time.monotonic() - asked - budget))
    if status == 200:
        told = json.loads(body)["thinkfast"]
        row.answered, row.samples = told["answer"] is not None, told["samples"]
    elif status == 429:
        row.retry = float(headers["retry-after"])
    return row


async def client(connection: Connection, asked: list[tuple[bytes, float]], until: float, seed: int) -> list[Row]:
    """Asks one thing after the other."""
    chance, rows = random.Random(seed), []
    await asyncio.sleep(chance.random())
    while time.monotonic() < until:
        rows.append(await one(connection, *chance.choice(asked)))
        await asyncio.sleep(rows[-1].retry)
    return rows


async def odd(server: Server, name: str, problem: str, until: float, kind: str, seen: Counter[str]) -> None:
    """A client that vanishes, sends what is no request, far too much, or reads very slowly."""
    chance = random.Random(kind)
    good = {"model": name, "messages": [{"role": "user", "content": problem}], "time_budget": 2.0}
    malformed = [b"{", b"[]", b'{"model": 1}', json.dumps({**good, "n": -1}).encode(), b"\xff" * 9]
    huge = [
        json.dumps({**good, "messages": [{"role": "user", "content": "pens " * n}]}) for n in (5_000, 180_000, 500_000)
    ]
    bodies = {
        "vanishes": [json.dumps({**good, "stream": stream}).encode() for stream in (False, True)],
        "malformed": malformed,
        "huge": [text.encode() for text in huge],
        "slow": [json.dumps({**good, "stream": True, "return_samples": True}).encode()],
    }
    while time.monotonic() < until:
        await asyncio.sleep(0.5)
        connection = Connection(server, 256 if kind == "slow" else 1 << 16)
        try:
            if kind in ("malformed", "huge"):
                told = f"{(await connection.ask(post(chance.choice(bodies[kind]))))[0] // 100}xx"
            else:
                reader, writer = await connection.open()
                writer.write(post(chance.choice(bodies[kind]), "Connection: close"))
                if kind == "vanishes":
                    await asyncio.sleep(chance.uniform(0.05, 0.5))
                    told = "gone"
                else:
                    await reader.readuntil(b" ")
                    told = f"{int(await reader.readexactly(3)) // 100}xx"
                    while await reader.read(64):
                        await asyncio.sleep(0.01)
            seen[f"{kind} {told}"] += 1
        except (OSError, asyncio.IncompleteReadError) as error:
            seen[f"{kind} {type(error).__name__}"] += 1
        connection.close()
