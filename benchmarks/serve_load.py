"""Puts a server under load on this machine and measures what its clients get: deadlines, errors, memory, throughput.

    python benchmarks/serve_load.py bundled --seconds 120 --clients 64 --out benchmarks/results/serve-load.json

Starts `thinkfast serve` on loopback. The bare engine draws from the same prompts with the same slots, before and after
the server. Clients ask for answers within budgets, one request after the other, while a few others misbehave: they
vanish, send malformed or huge bodies, or read slowly. In the end comes SIGTERM in the middle of the work. The last line
of stdout is one JSON document; the exit status is 1 when a bound does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2 as httpx

from thinkfast import runtime, stages
from thinkfast.data.wordproblems import generate

BUDGETS = (1.0, 2.0, 4.0)
CHAT = "/v1/chat/completions"
LATE_SECONDS, LATE_SHARE, WORTH, GROWTH = 0.05, 0.05, 0.85, 0.05


def main() -> int:
    """Measures, judges, writes; returns the exit status."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model")
    arguments.add_argument("--seconds", type=float, default=120.0)
    arguments.add_argument("--clients", type=int, default=64)
    arguments.add_argument("--slots", type=int, default=64)
    arguments.add_argument("--bare-seconds", type=float, default=15.0)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    model = stages.teacher_directory(given.model)
    problems = [made.problem for made in generate(11, 64, "held-out", [3, 4])]
    bare = [bare_rate(model, problems, given.slots, given.bare_seconds)]
    command = [sys.executable, "-m", "thinkfast", "serve", str(model), "--port", "0", "--slots", str(given.slots)]
    log = Path(f"{given.out}.log") if given.out else Path("serve-load.log")
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors, text=True) as server:
        try:
            measured = asyncio.run(load(server, log, model.resolve().name, problems, given))
        finally:
            server.kill()
    bare.append(bare_rate(model, problems, given.slots, given.bare_seconds))
    document = judge(measured, bare) | {
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


def bare_rate(model: Path, problems: list[str], slots: int, seconds: float) -> float:
    """Tokens a second of `Engine.stream` on the prompts, in a process of its own."""
    program = """
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
list(engine.stream(prompts, 1000, params, deadline=0.5))
started = time.monotonic()
tokens = sum(len(sample.token_ids) for _, _, sample in engine.stream(prompts, 10**6, params, deadline=seconds))
print(tokens / (time.monotonic() - started))
"""
    given = json.dumps([str(model), slots, seconds, problems])
    done = subprocess.run([sys.executable, "-c", program, given], capture_output=True, text=True, check=True)
    return float(done.stdout)


async def load(
    server: subprocess.Popen[str], log: Path, name: str, problems: list[str], given: argparse.Namespace
) -> dict[str, Any]:
    """Everything between the start of the server and its end."""
    address = await _address(server, log)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.1)
        began = time.monotonic()
        until = began + given.seconds
        rows: list[dict[str, Any]] = []
        memory: list[tuple[float, int]] = []
        tokens: list[tuple[float, float]] = []
        odd: Counter[str] = Counter()
        tasks = [_client(client, name, problems, until, index, rows) for index in range(given.clients)]
        tasks += [_odd(address, name, problems, until, index, odd) for index in range(4)]
        tasks += [_watch(client, server.pid, until, began, memory, tokens)]
        await asyncio.gather(*tasks)
        last = [asyncio.create_task(_ask(client, name, problems[0], 30.0)) for _ in range(8)]
        await asyncio.sleep(1.0)
        server.send_signal(signal.SIGTERM)
        told = time.monotonic()
        answered = [row["status"] for row in await asyncio.gather(*last)]
        status = await asyncio.to_thread(server.wait, 40)
    settled = [point for point in memory if point[0] >= given.seconds / 4] or memory
    warm = [point for point in tokens if point[0] >= min(10.0, given.seconds / 4)]
    return {
        "seconds": given.seconds,
        "requests": len(rows),
        "statuses": {str(status): count for status, count in sorted(Counter(row["status"] for row in rows).items())},
        "answered": sum(row["answered"] for row in rows),
        "samples": sum(row["samples"] for row in rows),
        "late": [row["late"] for row in rows if row["status"] == 200],
        "late_share": [row["late"] / row["budget"] for row in rows if row["status"] == 200],
        "odd": dict(odd),
        "memory_bytes": [settled[0][1], settled[-1][1], max(size for _, size in memory)],
        "tokens_per_second": (warm[-1][1] - warm[0][1]) / (warm[-1][0] - warm[0][0]),
        "after_sigterm": {"statuses": answered, "exit": status, "seconds": round(time.monotonic() - told, 2)},
    }


def judge(measured: dict[str, Any], bare: list[float]) -> dict[str, Any]:
    """The figures, and which of the bounds hold."""
    late, share = sorted(measured.pop("late")), sorted(measured.pop("late_share"))
    excess = sorted(min(a / LATE_SECONDS, b / LATE_SHARE) for a, b in zip(late, share, strict=True))
    at = max(0, round(0.99 * len(late)) - 1)
    first, last, _ = measured["memory_bytes"]
    worth = measured["tokens_per_second"] / statistics.mean(bare)
    after = measured["after_sigterm"]
    holds = {
        "no error but 429": set(measured["statuses"]) <= {"200", "429"},
        "p99 late by at most 5 % or 50 ms": bool(late) and excess[at] <= 1,
        "memory flat": last <= first * (1 + GROWTH),
        "85 % of the bare engine": worth >= WORTH,
        "SIGTERM answers everyone": set(after["statuses"]) == {200} and after["exit"] == 0,
        "the odd ones harm nobody": not any(name.endswith("5xx") for name in measured["odd"]),
    }
    return {
        **measured,
        "late_seconds": {"p50": late[len(late) // 2], "p99": late[at], "max": late[-1]} if late else {},
        "bare_tokens_per_second": bare,
        "share_of_bare": worth,
        "holds": holds,
    }


async def _address(server: subprocess.Popen[str], log: Path) -> str:
    while server.poll() is None:
        for line in log.read_text().splitlines():
            if '"serving"' in line:
                return str(json.loads(line)["address"])
        await asyncio.sleep(0.05)
    raise SystemExit(f"the server did not start: {log.read_text()}")


async def _ask(client: httpx.AsyncClient, name: str, problem: str, budget: float) -> dict[str, Any]:
    body = {
        "model": name,
        "messages": [{"role": "user", "content": problem}],
        "temperature": 0.8,
        "time_budget": budget,
    }
    asked = time.monotonic()
    answer = await client.post(CHAT, json=body)
    row: dict[str, Any] = {"status": answer.status_code, "budget": budget, "answered": False, "samples": 0}
    row["late"] = max(0.0, time.monotonic() - asked - budget)
    if answer.status_code == 200:
        told = answer.json()["thinkfast"]
        row |= {"answered": told["answer"] is not None, "samples": told["samples"]}
    elif answer.status_code == 429:
        row["retry"] = float(answer.headers["retry-after"])
    return row


async def _client(
    client: httpx.AsyncClient, name: str, problems: list[str], until: float, index: int, rows: list[dict[str, Any]]
) -> None:
    chance = random.Random(index)
    await asyncio.sleep(chance.random())
    while time.monotonic() < until:
        try:
            rows.append(await _ask(client, name, chance.choice(problems), chance.choice(BUDGETS)))
        except httpx.HTTPError as error:
            rows.append({"status": type(error).__name__, "budget": 1.0, "answered": False, "samples": 0, "late": 0.0})
        await asyncio.sleep(rows[-1].get("retry", 0.0))


async def _odd(address: str, name: str, problems: list[str], until: float, index: int, seen: Counter[str]) -> None:
    """A client that vanishes, sends what is no request, far too much, or reads very slowly; in turn."""
    chance = random.Random(1000 + index)
    good = {
        "model": name,
        "messages": [{"role": "user", "content": problems[index]}],
        "time_budget": 2.0,
        "stream": True,
    }
    while time.monotonic() < until:
        await asyncio.sleep(0.5)
        kind = ("vanishes", "malformed", "huge", "slow")[index]
        try:
            async with httpx.AsyncClient(base_url=address, timeout=60) as client:
                if kind == "vanishes":
                    with_timeout = httpx.Timeout(60, read=chance.uniform(0.05, 0.5))
                    answer = await client.post(CHAT, json={**good, "stream": False}, timeout=with_timeout)
                elif kind == "malformed":
                    bodies = (b"{", b"[]", b'{"model": 1}', json.dumps({**good, "n": -1}).encode(), b"\xff" * 9)
                    answer = await client.post(CHAT, content=chance.choice(bodies))
                elif kind == "huge":
                    text = "pens " * chance.choice((5000, 500_000))
                    answer = await client.post(CHAT, json={**good, "messages": [{"role": "user", "content": text}]})
                else:
                    async with client.stream("POST", CHAT, json={**good, "return_samples": True}) as answer:
                        async for _ in answer.aiter_raw(64):
                            await asyncio.sleep(0.01)
            seen[f"{kind} {answer.status_code // 100}xx"] += 1
        except httpx.HTTPError as error:
            seen[f"{kind} {type(error).__name__}"] += 1


async def _watch(
    client: httpx.AsyncClient,
    process: int,
    until: float,
    began: float,
    memory: list[tuple[float, int]],
    tokens: list[tuple[float, float]],
) -> None:
    """Resident memory and decoded tokens of the server, every second."""
    while time.monotonic() < until:
        page = (await client.get("/metrics")).text
        now = time.monotonic() - began
        line = next(line for line in page.splitlines() if line.startswith("thinkfast_decoded_tokens{"))
        tokens.append((now, float(line.rsplit(" ", 1)[1])))
        status = Path(f"/proc/{process}/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        memory.append((now, int(resident.split()[1]) * 1024))
        await asyncio.sleep(1.0)


if __name__ == "__main__":
    sys.exit(main())
