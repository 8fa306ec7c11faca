"""What is refused, how, and that refusing costs nothing."""

import contextlib
import hashlib
import json
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest

from thinkfast.errors import BadInput
from thinkfast.serve.app import Limits, create_app
from thinkfast.serve.draw import Served
from thinkfast.serve.gate import Bounds, JsonLines
from thinkfast.serve.keys import Keys, load_keys

Serve = Callable[..., str]
Wait = Callable[[Callable[[], bool]], None]
GOOD: dict[str, Any] = {"model": "talker", "messages": [{"role": "user", "content": "Ada has 3 pens."}]}
CHAT = "/v1/chat/completions"
PATIENCE = 120.0
ENDLESS = {**GOOD, "model": "endless", "time_budget": 600.0}
LONG = Limits(answer=100_000, budget=600.0)


def test_no_text_is_so_long_that_others_wait_for_it(address: str) -> None:
    """Cutting these 900 KB into words would take half a minute."""
    started = time.monotonic()
    for path, body in (
        (CHAT, {"messages": [{"role": "user", "content": "pens " * 180_000}]}),
        ("/v1/completions", {"prompt": "pens " * 180_000}),
    ):
        answer = post(address, {"model": "talker", **body}, path)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert time.monotonic() - started < 10


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def request(body: Any) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


def post(address: str, body: Any, path: str = CHAT, **options: Any) -> httpx.Response:
    return httpx.post(f"{address}{path}", json=body, timeout=60, **options)


@pytest.mark.parametrize(
    ("change", "param", "told"),
    [
        ({"model": None}, "model", "model: input should be a valid string, not None"),
        ({"messages": []}, "messages", "messages: list should have at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "messages.0.content: field required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user' or"),
        ({"temperature": "hot"}, "temperature", "temperature: input should be a valid number, not 'hot'"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0, not -1"),
        ({"temperatur": 1}, "temperatur", "temperatur: unknown field, did you mean temperature?"),
        ({"n": 0}, "n", "greater than or equal to 1, not 0"),
        ({"n": 9}, "n", "n: expected at most 8, not 9"),
        ({"n": "3"}, "n", "n: input should be a valid integer, not '3'"),
        ({"top_p": 0}, "top_p", "greater than 0, not 0"),
        ({"seed": 2**63}, "seed", "seed: input should be less than"),
        ({"stop": ["a", ""]}, "stop.1", "at least 1 character"),
        ({"stop": list("abcde")}, "stop", "at most 4 items"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5000}, "max_tokens", "max_tokens: expected at most 700 behind a prompt of"),
        ({"presence_penalty": 0.5}, "presence_penalty", "less than or equal to 0"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"time_budget": 21}, "time_budget", "time_budget: expected at most 20 seconds, not 21"),
        ({"time_budget": 0}, "time_budget", "greater than 0"),
        ({"strategy": "luck"}, "strategy", "'majority', 'best_of_n', 'weighted' or 'adaptive', not 'luck'"),
        ({"strategy": "majority", "n": 2, "min_samples": 3}, "min_samples", "expected at most n = 2, not 3"),
        ({"strategy": "majority", "logprobs": True}, "logprobs", "not with time_budget or strategy"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only together with stream"),
        ({"messages": [{"role": "user", "content": "pens " * 400}]}, "messages", "expected at most 300 tokens, not"),
        ({"messages": [{"role": "user", "content": "pens " * 1000}]}, "messages", "at most 4800 characters, not 5000"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "'\\ud800'"),
    ],
)
def test_a_malformed_request_is_told_the_field(address: str, change: dict[str, Any], param: str, told: str) -> None:
    content = json.dumps({**GOOD, **change})  # escapes what is no Unicode
    answer = httpx.post(f"{address}{CHAT}", content=content, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert told in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the body: expected a JSON object"),
        (b"[]", "the body: expected a JSON object"),
        (b"{", "the body is not valid JSON"),
        (b'{"model": NaN}', "model: input should be a valid string"),
        (b"\xff\xfe", "error"),
        (b"[" * 100_000, "error"),
        (b'"x"', "the body: expected a JSON object"),
    ],
)
def test_bodies_that_are_none(address: str, content: bytes, told: str) -> None:
    answer = httpx.post(f"{address}{CHAT}", content=content, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == 400
    assert told in answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_other_places_and_methods(address: str) -> None:
    for method, path, status in (
        ("GET", "/v2", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/", 405),
        ("POST", "/v1/models", 405),
    ):
        answer = httpx.request(method, f"{address}{path}", timeout=60)
        assert answer.status_code == status
        assert path in answer.json()["error"]["message"]
    assert post(address, {"model": "x", "prompt": [1]}, "/v1/completions").status_code == 404
    answer = post(address, {"model": "talker", "prompt": [1, 10**9], "max_tokens": 3}, "/v1/completions")
    assert answer.status_code == 400
    assert "holds token id 1000000000, expected 0 to" in answer.json()["error"]["message"]


def test_large_and_slow_bodies(serve: Serve) -> None:
    address = serve(Limits(bounds=Bounds(body_bytes=2000, body_seconds=PATIENCE)))
    answer = post(address, {**GOOD, "user": "x" * 3000})
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "the body: expected at most 2000 bytes"

    def chunks() -> Any:
        for _ in range(100):
            yield b" " * 100

    assert httpx.post(f"{address}{CHAT}", content=chunks(), timeout=60).status_code == 413
    with connect(serve(Limits(bounds=Bounds(body_seconds=0.3)))) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(4000).startswith(b"HTTP/1.1 408 ")


def keys_file(path: Path, *rows: tuple[str, str, float]) -> Path:
    lines = [
        f'[[key]]\nname = "{name}"\nrequests_per_minute = {rate}\n'
        f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
        for name, key, rate in rows
    ]
    path.write_text("\n".join(lines))
    return path


def test_keys(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinkfast.serve.keys.time", SimpleNamespace(monotonic=lambda: 100.0))
    address = serve(keys=load_keys(keys_file(tmp_path / "keys.toml", ("ada", "sesame", 600.0), ("ben", "poppy", 2.0))))
    ada, ben = {"Authorization": "Bearer sesame"}, {"Authorization": "Bearer poppy"}
    for headers in ({}, {"Authorization": "sesame"}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            answer = httpx.get(f"{address}{path}", headers=headers, timeout=60)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert post(address, GOOD, headers=headers).status_code == 401
    for path in ("/", "/page.js", "/health", "/ready"):
        assert httpx.get(f"{address}{path}", timeout=60).status_code == 200
    assert httpx.get(f"{address}/v1/models", headers=ada, timeout=60).status_code == 200
    body = {**GOOD, "max_tokens": 2}
    assert [post(address, body, headers=ben).status_code for _ in range(3)] == [200, 200, 429]
    refused = post(address, body, headers=ben)
    assert int(refused.headers["retry-after"]) == 30
    assert refused.json()["error"]["message"] == "this key may ask 2 times a minute"
    assert post(address, body, headers=ada).status_code == 200, "another's limit is not one's own"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "key: field required"),
        ("[[key]]\nname = 'x'", "key.0.sha256: field required"),
        ("[[key]]\nname = 'x'\nsha256 = 'secret'", "key.0.sha256: string should match pattern"),
        (
            f"[[key]]\nname = 'x'\nsha256 = '{'a' * 64}'\nrequests_per_minute = 0",
            "requests_per_minute: input should be gr",
        ),
        (f"[[key]]\nname = 'x'\nsha256 = '{'a' * 64}'\n" * 2, "name 'x' occurs twice"),
        ("[[key]", "not TOML"),
    ],
)
def test_broken_key_files(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        load_keys(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert told in str(caught.value)
    with pytest.raises(BadInput, match="no key file there"):
        load_keys(tmp_path / "none.toml")


def test_a_full_queue_says_when_to_come_again(serve: Serve, wait_until: Wait) -> None:
    address = serve(replace(LONG, queue=2))
    with httpx.Client(timeout=PATIENCE) as client, contextlib.ExitStack() as stack:
        for seconds in (500.0, 600.0):
            body = {**ENDLESS, "time_budget": seconds, "stream": True}
            held = stack.enter_context(client.stream("POST", f"{address}{CHAT}", json=body))
            assert held.status_code == 200
        refused = [post(address, {**GOOD, "max_tokens": 2}) for _ in range(3)]
    assert [answer.status_code for answer in refused] == [429] * 3
    assert 500 - PATIENCE < int(refused[0].headers["retry-after"]) <= 500, "when the first of them ends"
    assert refused[0].json()["error"] == {
        "message": "2 requests are open already",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    wait_until(lambda: post(address, {**GOOD, "max_tokens": 2}).status_code == 200)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_costs_nothing_more(serve: Serve, unending: Served, wait_until: Wait, stream: bool) -> None:
    address, live = serve(LONG), unending.live
    wait_until(lambda: live.requests == 0)
    with connect(address) as connection:
        connection.sendall(request({**ENDLESS, "stream": stream}))
        wait_until(lambda: live.running > 0)
        if stream:
            assert connection.recv(4000).startswith(b"HTTP/1.1 200 ")
        assert live.requests == 1
    left = time.monotonic()
    wait_until(lambda: live.requests == live.running == 0)
    assert time.monotonic() - left < 5


def test_who_does_not_read_is_left(serve: Serve, models: list[Served], wait_until: Wait) -> None:
    """Chains without end, into a socket that nobody empties: the server stops when a write has waited long enough."""
    address, live = serve(replace(LONG, samples=10**9, bounds=Bounds(send_seconds=0.3))), models[1].live
    body = {**GOOD, "model": "rambler", "time_budget": 600, "max_tokens": 40, "stream": True, "return_samples": True}
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE)
        connection.connect((host, int(port)))
        connection.sendall(request(body))
        assert connection.recv(12) == b"HTTP/1.1 200"
        wait_until(lambda: live.requests == live.running == 0)


def test_figures_and_log(serve: Serve, wait_until: Wait) -> None:
    records: list[logging.LogRecord] = []
    log = logging.getLogger("thinkfast.serve")
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log.addHandler(handler)
    before = log.level
    log.setLevel(logging.INFO)
    try:
        address = serve()
        post(address, {**GOOD, "time_budget": 20, "n": 5})
        post(address, {**GOOD, "temperature": 9})
        text = httpx.get(f"{address}/metrics", timeout=60).text
        assert 'thinkfast_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
        assert 'thinkfast_requests_total{path="/v1/chat/completions",status="400"} 1.0' in text
        assert "thinkfast_late_seconds_count 1.0" in text
        assert 'thinkfast_running_samples{model="rambler"} 0.0' in text
        lines = [json.loads(JsonLines().format(record)) for record in records]
        asked = [line for line in lines if line.get("path") == CHAT]
        assert [line["status"] for line in asked] == [200, 400]
        assert asked[0]["budget"] == 20
        assert asked[0]["samples"] > 0
        assert asked[0]["stopped"] in ("deadline", "samples", "decided")
        assert "Ada" not in json.dumps(lines)
        shown = serve(log_prompts=True)
        post(shown, {**GOOD, "max_tokens": 2})
        wait_until(lambda: any("Ada has 3 pens." in JsonLines().format(record) for record in records))
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def test_two_models_of_one_name(models: list[Served]) -> None:
    with pytest.raises(BadInput, match="model name 'talker' occurs twice"):
        create_app([models[0], models[0]])


def test_buckets_fill_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [100.0]
    monkeypatch.setattr("thinkfast.serve.keys.time.monotonic", lambda: now[0])
    keys: Keys = load_keys(keys_file(tmp_path / "k.toml", ("ada", "sesame", 6.0)))
    from thinkfast.serve.wire import Refused

    for _ in range(6):
        assert keys.admit("Bearer sesame", counts=True) == "ada"
    with pytest.raises(Refused) as caught:
        keys.admit("Bearer sesame", counts=True)
    assert caught.value.retry == 10
    assert keys.admit("Bearer sesame", counts=False) == "ada"
    now[0] += 10.0
    assert keys.admit("bearer sesame", counts=True) == "ada"
    with pytest.raises(Refused):
        keys.admit("Bearer sesame", counts=True)
