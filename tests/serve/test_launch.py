"""`thinkfast serve` as a process: it says where it is, and hands back what runs when it is told to stop."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from thinkfast.errors import BadInput
from thinkfast.serve.launch import bind

ASK: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "Ada has 3 pens."}]}


@pytest.fixture
def process(rambler: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "thinkfast", "serve", str(rambler), "--port", "0", "--slots", "4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        line = json.loads(started.stderr.readline())
        assert line["event"] == "serving"
        yield started, line["address"]
        started.kill()


def test_what_runs_is_handed_back(process: tuple[subprocess.Popen[str], str]) -> None:
    server, address = process
    while True:  # the address is told before the server listens
        try:
            assert httpx.get(f"{address}/ready", timeout=60).status_code == 200
            break
        except httpx.TransportError:
            time.sleep(0.05)
    found: dict[str, Any] = {}

    def ask(name: str, **body: Any) -> None:
        found[name] = httpx.post(f"{address}/v1/chat/completions", json={**ASK, **body}, timeout=60)

    threads = [
        threading.Thread(target=ask, args=("short",), kwargs={"time_budget": 4.0}),
        threading.Thread(target=ask, args=("long",), kwargs={"time_budget": 50.0, "return_samples": True}),
    ]
    for thread in threads:
        thread.start()
    while 'thinkfast_open_requests{model="model"} 2.0' not in httpx.get(f"{address}/metrics", timeout=60).text:
        time.sleep(0.05)
    server.send_signal(signal.SIGTERM)
    told = time.monotonic()
    for thread in threads:
        thread.join(40)
    assert server.wait(20) == 0
    assert time.monotonic() - told < 25
    assert found["short"].status_code == found["long"].status_code == 200
    assert found["short"].json()["thinkfast"]["stopped"] == "deadline"
    assert found["short"].json()["thinkfast"]["seconds"] < 6
    long = found["long"].json()["thinkfast"]
    assert long["seconds"] < 20
    assert all(chain["tokens"] > 0 for chain in long["chains"])
    assert len(long["chains"]) > 0
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
