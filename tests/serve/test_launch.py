"""`thinkfast serve` as a process: it says where it is, and hands back what runs when it is told to stop."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from thinkfast.errors import BadInput
from thinkfast.serve.launch import bind

ASK: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "Ada has 3 pens."}]}


@pytest.fixture
def process(endless: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "thinkfast", "serve", str(endless), "--port", "0", "--slots", "4"]
    command += ["--max-tokens", "100000", "--max-budget", "3600s"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        line = json.loads(started.stderr.readline())
        assert line["event"] == "serving"
        yield started, line["address"]
        started.kill()


def test_what_runs_is_handed_back(
    process: tuple[subprocess.Popen[str], str], wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    server, address = process

    def ready() -> bool:
        try:
            return httpx.get(f"{address}/ready", timeout=60).status_code == 200
        except httpx.TransportError:  # the address is told before the server listens
            return False

    wait_until(ready)
    found: dict[str, Any] = {}

    def ask(name: str, **body: Any) -> None:
        found[name] = httpx.post(f"{address}/v1/chat/completions", json={**ASK, **body}, timeout=120)

    budgets = {"hour": 3600.0, "half an hour": 1800.0}
    threads = [
        threading.Thread(target=ask, args=(name,), kwargs={"time_budget": seconds, "return_samples": True})
        for name, seconds in budgets.items()
    ]
    for thread in threads:
        thread.start()
    open_ = 'thinkfast_open_requests{model="model"} 2.0'
    wait_until(lambda: open_ in httpx.get(f"{address}/metrics", timeout=60).text)
    server.send_signal(signal.SIGTERM)
    stopped = time.monotonic()
    for thread in threads:
        thread.join(40)
    assert server.wait(20) == 0
    assert time.monotonic() - stopped < 25
    for name in budgets:
        assert found[name].status_code == 200
        told = found[name].json()["thinkfast"]
        assert told["stopped"] == "deadline"
        assert told["seconds"] < 20, "handed back long before its own deadline"
        assert all(chain["tokens"] > 0 for chain in told["chains"])
        assert len(told["chains"]) > 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health", timeout=5)


def test_only_this_machine_without_keys() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        try:
            bind(host, 0, guarded=False).close()
        except BadInput as error:
            assert host == "::1", error  # noqa: PT017 - a machine without IPv6 cannot
    bind("0.0.0.0", 0, guarded=True).close()
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(BadInput, match="can be reached from other machines: expected --keys FILE"):
            bind(host, 0, guarded=False)
    with bind("127.0.0.1", 0, guarded=False) as taken, pytest.raises(BadInput, match="cannot be bound"):
        bind("127.0.0.1", taken.getsockname()[1], guarded=False)
