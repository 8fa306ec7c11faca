"""Puts a server under load on this machine and measures what its clients get: deadlines, errors, memory, throughput.

    python benchmarks/serve_load.py bundled --seconds 120 --clients 64 --out benchmarks/results/serve-load.json

Starts `thinkfast serve` on loopback. Clients ask for answers within budgets, one request after the other on a
connection of their own, for `--seconds` and twice more for a fifth of that; meanwhile a few others misbehave: they
vanish, send malformed or huge bodies, or read slowly. Before, between and after the three phases the bare engine draws
from the same prompts with the same slots while the server is idle. In the end comes SIGTERM in the middle of the work.

Clients and server share the cores: `cpu_seconds` says how much each of them took. A token counts where it was decoded
and not thrown away. The last line of stdout is one JSON document; the exit status is 1 when a bound does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinkfast import runtime, stages
from thinkfast.data.wordproblems import generate

BUDGETS = (1.0, 2.0, 4.0)
CHAT = "/v1/chat/completions"
LATE_SECONDS, LATE_SHARE, WORTH, GROWTH = 0.05, 0.05, 0.85, 0.05
WARM = 3.0
ODD = ("vanishes", "malformed", "huge", "slow")
BARE = """
import json, sys, time
from pathlib import Path
from thinkfast.data.chat import render_prompt
from thinkfast.data.tokenizer import load_tokenizer
from thinkfast.engine import Engine, SamplingParams
from thinkfast.model.checkpoint import load_model
model, slots, seconds, problems = json.loads(sys.argv[1])
tokenizer = load_tokenizer(model)
engine = Engine(load_model(model), slots)
prompts = [render_prompt(tokenizer, problem) for problem in problems]
params = SamplingParams(max_tokens=1500, temperature=0.8)
list(engine.stream(prompts, 1000, params, deadline=1.0))
started, used = time.monotonic(), time.process_time()
tokens = sum(len(sample.token_ids) for _, _, sample in engine.stream(prompts, 10**6, params, deadline=seconds))
took = time.monotonic() - started
print(json.dumps([tokens / took, (time.process_time() - used) / took]))
"""


@dataclass(slots=True)
class Row:
    """One request and what came of it; `late` in seconds, 0 where it was in time."""

    status: str
    budget: float
    late: float = 0.0
    answered: bool = False
    samples: int = 0
    retry: float = 0.0


@dataclass(slots=True)
class Phase:
    """A while under load: tokens a second that were worth something, and the processor seconds of both sides."""

    seconds: float
    tokens_per_second: float
    cpu_seconds: dict[str, float]
    rows: list[Row] = field(repr=False)


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
    huge = [json.dumps({**good, "messages": [{"role": "user", "content": "pens " * n}]}) for n in (5000, 500_000)]
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


async def phase(
    server: Server,
    name: str,
    problems: list[str],
    seconds: float,
    clients: int,
    seen: Counter[str],
    memory: list[tuple[float, int]],
) -> Phase:
    """One while under load."""
    began = time.monotonic()
    until = began + seconds
    asked = [(chat(name, problem, budget), budget) for problem in problems for budget in BUDGETS]
    connections = [Connection(server) for _ in range(clients)]
    tasks = [client(connection, asked, until, index) for index, connection in enumerate(connections)]
    strange = [odd(server, name, problems[0], until, kind, seen) for kind in ODD]
    work = asyncio.gather(asyncio.gather(*tasks), *strange)
    watch = Connection(server)
    await asyncio.sleep(min(WARM, seconds / 4))
    used, server_used = time.process_time(), server.cpu()
    first, since = await worth(watch), time.monotonic()
    while time.monotonic() < until:
        memory.append((time.monotonic() - began, server.memory()))
        await asyncio.sleep(min(1.0, max(0.0, until - time.monotonic())))
    last, now = await worth(watch), time.monotonic()
    cpu = {"clients": time.process_time() - used, "server": server.cpu() - server_used, "of": now - since}
    done = await work
    for connection in (*connections, watch):
        connection.close()
    return Phase(seconds, (last - first) / (now - since), cpu, [row for rows in done[0] for row in rows])


async def worth(watch: Connection) -> float:
    """Tokens decoded so far, without those thrown away."""
    page = (await watch.get("/metrics"))[1].decode()
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("thinkfast_d"))
    (decoded,) = [value for key, value in values.items() if key.startswith("thinkfast_decoded_tokens{")]
    (dropped,) = [value for key, value in values.items() if key.startswith("thinkfast_dropped_tokens{")]
    return float(decoded) - float(dropped)


async def load(server: Server, model: Path, problems: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """Everything between the start of the server and its end."""
    await server.find()
    name = model.resolve().name
    memory: list[tuple[float, int]] = []
    seen: Counter[str] = Counter()
    phases, bare = [], [bare_rate(model, problems, given)]
    for seconds in (given.seconds, given.seconds / 5, given.seconds / 5):
        points = memory if not phases else []
        phases.append(await phase(server, name, problems, seconds, given.clients, seen, points))
        bare.append(bare_rate(model, problems, given))
    connections = [Connection(server) for _ in range(given.clients)]
    last = [asyncio.create_task(one(each, chat(name, problems[0], 30.0), 30.0)) for each in connections]
    await asyncio.sleep(1.0)
    server.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    answered = Counter(row.status for row in await asyncio.gather(*last))
    status = await asyncio.to_thread(server.process.wait, 60)
    after = {"statuses": dict(answered), "exit": status, "seconds": round(time.monotonic() - told, 2)}
    settled = [size for at, size in memory if at >= given.seconds / 4]
    return {
        "phases": phases,
        "bare": bare,
        "odd": dict(sorted(seen.items())),
        "memory_bytes": [settled[0], settled[-1], max(size for _, size in memory)],
        "after_sigterm": after,
    }


def bare_rate(model: Path, problems: list[str], given: argparse.Namespace) -> tuple[float, float]:
    """Tokens a second of `Engine.stream` on the prompts and the cores it keeps busy, in a process of its own."""
    what = json.dumps([str(model), given.slots, given.bare_seconds, problems])
    done = subprocess.run([sys.executable, "-c", BARE, what], capture_output=True, text=True, check=True)
    rate, cores = json.loads(done.stdout)
    return rate, cores


def judge(measured: dict[str, Any]) -> dict[str, Any]:
    """The figures, and which of the bounds hold."""
    phases: list[Phase] = measured.pop("phases")
    bare: list[tuple[float, float]] = measured.pop("bare")
    rows = [row for phase in phases for row in phase.rows]
    good = [row for row in rows if row.status == "200"]
    late = sorted(row.late for row in good)
    excess = sorted(row.late / max(LATE_SECONDS, LATE_SHARE * row.budget) for row in good)
    at = max(0, round(0.99 * len(late)) - 1)
    rates = [rate for rate, _ in bare]
    whole = sum(phase.seconds for phase in phases)
    rate = sum(phase.tokens_per_second * phase.seconds for phase in phases) / whole
    share = rate / statistics.mean(rates)
    beside = [p.tokens_per_second / statistics.mean(rates[i : i + 2]) for i, p in enumerate(phases)]
    first, last, _ = measured["memory_bytes"]
    after, statuses = measured["after_sigterm"], Counter(row.status for row in rows)
    holds = {
        "no error but 429": set(statuses) <= {"200", "429"},
        "p99 late by at most 5 % or 50 ms": bool(good) and excess[at] <= 1,
        "memory flat": last <= first * (1 + GROWTH),
        "85 % of the bare engine": share >= WORTH,
        "SIGTERM answers everyone": set(after["statuses"]) == {"200"} and after["exit"] == 0,
        "the odd ones harm nobody": not any(name.endswith("5xx") for name in measured["odd"]),
    }
    return {
        "requests": len(rows),
        "statuses": dict(sorted(statuses.items())),
        "answered": sum(row.answered for row in rows),
        "samples": sum(row.samples for row in rows),
        "late_seconds": {"p50": late[len(late) // 2], "p99": late[at], "max": late[-1]} if late else {},
        "tokens_per_second": rate,
        "bare_tokens_per_second": rates,
        "share_of_bare": share,
        "share_of_bare_beside": beside,
        "cpu_seconds": [phase.cpu_seconds for phase in phases],
        "bare_cores": [cores for _, cores in bare],
        "seconds": [phase.seconds for phase in phases],
        **measured,
        "holds": holds,
    }


def main() -> int:
    """Measures, judges, writes; returns the exit status."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model")
    arguments.add_argument("--seconds", type=float, default=120.0)
    arguments.add_argument("--clients", type=int, default=64)
    arguments.add_argument("--slots", type=int, default=64)
    arguments.add_argument("--bare-seconds", type=float, default=10.0)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    model = stages.teacher_directory(given.model)
    problems = [made.problem for made in generate(11, 64, "held-out", [3, 4])]
    command = [sys.executable, "-m", "thinkfast", "serve", str(model), "--port", "0", "--slots", str(given.slots)]
    server = Server(command, Path(tempfile.mkdtemp()) / "serve-load.log")
    try:
        measured = asyncio.run(load(server, model, problems, given))
    finally:
        server.end()
    document = judge(measured) | {
        "command": " ".join(["python", *sys.argv]),
        "machine": runtime.machine(),
        "versions": runtime.versions(),
        "code": runtime.code_version(),
        "clients": given.clients,
        "slots": given.slots,
        "budgets": list(BUDGETS),
    }
    if given.out:
        given.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return 0 if all(document["holds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
