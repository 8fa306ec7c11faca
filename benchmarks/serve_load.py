"""Puts a server under load on this machine and measures what its clients get: deadlines, errors, memory, throughput.

    python benchmarks/serve_load.py [MODEL] --seconds 120 --clients 64 --out benchmarks/results/serve-load.json

MODEL: by default the pure student of `make demo`, or without one a fresh conversion of the bundled teacher, which costs
as much a token but has not learnt to come to an end. Starts `thinkfast serve` on loopback. Clients ask for answers
within budgets, one request after the other on a connection of their own, for `--seconds` and then in `--turns` short
turns; meanwhile a few others misbehave: they vanish, send malformed or huge bodies, or read slowly. Between the turns,
while the server is idle, the bare engine (`Engine.stream`) draws from the same 64 prompts with the same slots; both
feed a prompt once and keep its state. `share_of_bare` is the median over the short turns, each against the mean of the
bare engine just before and just after it: a machine's pace changes within minutes. Turns in which the host kept a
twentieth of the cores or more for itself are told and not counted, unless fewer than three are left. In the end comes
SIGTERM in the middle of the work.

Clients, server and bare engine have the same cores. Nothing is subtracted for the clients: `cpu_seconds` says what they
took, `stolen_seconds` what the host kept of the cores. A token counts for `tokens_per_second` where it was decoded and
not thrown away because its sample had to start anew, on both sides also in chains that a deadline cut off; how many
belong to chains that came to their end stands beside it. The last line of stdout is one JSON document; the exit status
is 1 when a bound does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from serve_clients import ODD, Connection, Row, Server, chat, client, odd, one

from thinkfast import runtime, stages
from thinkfast.cli import main as thinkfast
from thinkfast.data.wordproblems import generate

BUDGETS = (1.0, 2.0, 4.0)
LATE_SECONDS, LATE_SHARE, WORTH, GROWTH = 0.05, 0.05, 0.85, 0.05
WARM = 3.0
CALM = 0.1  # seconds that the host may keep of the cores, a second of a turn, where a share is counted
STUDENT = Path("runs/demo/models/pure")
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
started, used, tokens, ended = time.monotonic(), time.process_time(), 0, 0
for _, _, sample in engine.stream(prompts, 10**6, params, deadline=seconds):
    tokens += len(sample.token_ids)
    ended += len(sample.token_ids) if sample.finish_reason == "stop" else 0
took = time.monotonic() - started
print(json.dumps([tokens / took, ended / took, (time.process_time() - used) / took]))
"""


@dataclass(slots=True)
class Phase:
    """A while under load.

    Tokens a second: all that were not thrown away, and those of chains that ended. occupied: slots in use, on average.
    cpu_seconds: of both sides, `of` so many seconds of the clock; stolen_seconds: of all cores, kept by the host.
    """

    seconds: float
    tokens_per_second: float
    ended_tokens_per_second: float
    occupied: float
    cpu_seconds: dict[str, float]
    stolen_seconds: float
    rows: list[Row] = field(repr=False)


@dataclass(slots=True)
class Bare:
    """The bare engine alone on the machine; `cores`: processor seconds a second."""

    tokens_per_second: float
    ended_tokens_per_second: float
    cores: float
    stolen_seconds: float


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
    await asyncio.sleep(min(WARM, seconds / 4))
    used, server_used, lost = time.process_time(), server.cpu(), stolen()
    first, since, running = await figures(server), time.monotonic(), []
    while time.monotonic() < until:
        memory.append((time.monotonic() - began, server.memory()))
        await asyncio.sleep(min(1.0, max(0.0, until - time.monotonic())))
        running.append((await figures(server))["running_samples"])
    last, now = await figures(server), time.monotonic()
    cpu = {"clients": time.process_time() - used, "server": server.cpu() - server_used, "of": now - since}
    lost = stolen() - lost
    done = await work
    for connection in connections:
        connection.close()
    grown = {name: (last[name] - first[name]) / (now - since) for name in last}
    worth = grown["decoded_tokens"] - grown["dropped_tokens"]
    rows = [row for rows in done[0] for row in rows]
    return Phase(seconds, worth, grown["ended_tokens_total"], statistics.mean(running), cpu, lost, rows)


async def figures(server: Server) -> dict[str, float]:
    """What the server counts for its model."""
    connection = Connection(server)
    page = (await connection.get("/metrics"))[1].decode()
    connection.close()
    lines = [line.removeprefix("thinkfast_").rsplit(" ", 1) for line in page.splitlines() if "{model=" in line]
    return {name.partition("{")[0]: float(value) for name, value in lines}


def stolen() -> float:
    """Processor seconds that the host has kept of this machine's cores so far."""
    return int(Path("/proc/stat").read_text().split()[8]) / os.sysconf("SC_CLK_TCK")


async def load(server: Server, model: Path, problems: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """Everything between the start of the server and its end."""
    await server.find()
    name = model.resolve().name
    memory: list[tuple[float, int]] = []
    seen: Counter[str] = Counter()
    phases = [await phase(server, name, problems, given.seconds, given.clients, seen, memory)]
    bare = [bare_rate(model, problems, given)]
    for _ in range(given.turns):
        phases.append(await phase(server, name, problems, given.turn_seconds + WARM, given.clients, seen, []))
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


def bare_rate(model: Path, problems: list[str], given: argparse.Namespace) -> Bare:
    """`Engine.stream` on the prompts, in a process of its own."""
    what, lost = json.dumps([str(model), given.slots, given.turn_seconds, problems]), stolen()
    done = subprocess.run([sys.executable, "-c", BARE, what], capture_output=True, text=True, check=True)
    return Bare(*json.loads(done.stdout), stolen() - lost)


def judge(measured: dict[str, Any]) -> dict[str, Any]:
    """The figures, and which of the bounds hold."""
    phases: list[Phase] = measured.pop("phases")
    bare: list[Bare] = measured.pop("bare")
    rows = [row for phase in phases for row in phase.rows]
    good = [row for row in rows if row.status == "200"]
    late = sorted(row.late for row in good)
    excess = sorted(row.late / max(LATE_SECONDS, LATE_SHARE * row.budget) for row in good)
    at = max(0, round(0.99 * len(late)) - 1)
    rates = [each.tokens_per_second for each in bare]
    shares = [p.tokens_per_second / statistics.mean(rates[i : i + 2]) for i, p in enumerate(phases[1:])]
    kept = [each.stolen_seconds for each in bare]
    calm = [max(p.stolen_seconds, *kept[i : i + 2]) < CALM * p.seconds for i, p in enumerate(phases[1:])]
    counted = [value for value, good in zip(shares, calm, strict=True) if good]
    share = statistics.median(counted if len(counted) >= 3 else shares)
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
        "tokens_per_second": phases[0].tokens_per_second,
        "share_of_bare": share,
        "shares_of_bare": shares,
        "undisturbed_turns": calm,
        "phases": [{key: value for key, value in asdict(each).items() if key != "rows"} for each in phases],
        "bare": [asdict(each) for each in bare],
        **measured,
        "holds": holds,
    }


def student(given: str | None, room: Path) -> tuple[Path, str]:
    """The model to serve, and what it is."""
    if given is not None:
        return stages.teacher_directory(given), given
    if (STUDENT / "config.json").is_file():
        return STUDENT, f"{STUDENT}, the pure student of the demo"
    made = room / "pure"
    if thinkfast(["convert", "bundled", str(made)]):
        raise SystemExit("the bundled teacher could not be converted")
    return made, "the bundled teacher converted to Mamba in all layers, not trained"


def main() -> int:
    """Measures, judges, writes; returns the exit status."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", nargs="?")
    arguments.add_argument("--seconds", type=float, default=120.0)
    arguments.add_argument("--clients", type=int, default=64)
    arguments.add_argument("--slots", type=int, default=64)
    arguments.add_argument("--turns", type=int, default=16)
    arguments.add_argument("--turn-seconds", type=float, default=5.0)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    room = Path(tempfile.mkdtemp())
    model, what = student(given.model, room)
    problems = [made.problem for made in generate(11, 64, "held-out", [3, 4])]
    command = [sys.executable, "-m", "thinkfast", "serve", str(model), "--port", "0", "--slots", str(given.slots)]
    server = Server(command, room / "serve-load.log")
    try:
        measured = asyncio.run(load(server, model, problems, given))
    finally:
        server.end()
    document = judge(measured) | {
        "command": runtime.command(),
        "machine": runtime.machine(),
        "versions": runtime.versions(),
        "code": runtime.code_version(),
        "model": what,
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
