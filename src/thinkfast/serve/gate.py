"""What every request passes: its body within bounds, its key, the log line and the count when it is answered."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thinkfast.serve.keys import Keys
from thinkfast.serve.meter import Meter
from thinkfast.serve.wire import Refused

OPEN = ("/", "/page.css", "/page.js", "/health", "/ready")
ASKING = ("/v1/chat/completions", "/v1/completions")
PATHS = (*OPEN, *ASKING, "/v1/models", "/metrics", "/openapi.json")
log = logging.getLogger("thinkfast.serve")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bytes a body may have, seconds in which it must be here, seconds in which a reader must take what it is sent."""

    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    send_seconds: float = 30.0


class Gate:
    """ASGI middleware. `scope["state"]` gets `arrived` (monotonic seconds) and `facts`, which go into the log line."""

    def __init__(self, app: ASGIApp, keys: Keys | None, meter: Meter, bounds: Bounds) -> None:
        self._app, self._keys, self._meter, self._bounds = app, keys, meter, bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 499
        facts: dict[str, Any] = {}
        scope.setdefault("state", {}).update(arrived=started, facts=facts)
        identity = secrets.token_hex(8).encode()

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", identity)]}
            async with asyncio.timeout(self._bounds.send_seconds):
                await send(message)

        try:
            try:
                self._identify(scope, facts)
                body = await self._body(scope, receive)
            except Refused as refused:
                await answer(refused)(scope, receive, tell)
                return
            if body is not None:
                await self._app(scope, _replay(body, receive), tell)
        except (TimeoutError, OSError):
            facts["gone"] = True  # the client stopped reading, or is not there any more
        except Exception:
            status = 500
            log.exception("failed", extra={"facts": {"id": identity.decode()}})
            raise
        finally:
            self._note(scope, status, time.monotonic() - started, identity.decode(), facts)

    def _identify(self, scope: Scope, facts: dict[str, Any]) -> None:
        if self._keys is None or scope["path"] in OPEN:
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"").decode("latin-1")
        facts["key"] = self._keys.admit(given, counts=scope["path"] in ASKING)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client left before it was here. Raises Refused: 408, 413."""
        most = self._bounds.body_bytes
        too_much = Refused(413, f"the body: expected at most {most} bytes", code="body_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise too_much
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._bounds.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    if sum(map(len, parts)) > most:
                        raise too_much
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            told = f"the body did not arrive within {self._bounds.body_seconds:g} s"
            raise Refused(408, told, code="body_timeout") from None

    def _note(self, scope: Scope, status: int, seconds: float, identity: str, facts: dict[str, Any]) -> None:
        path = scope["path"] if scope["path"] in PATHS else "other"
        self._meter.requests.labels(path, str(status)).inc()
        self._meter.seconds.labels(path).observe(seconds)
        if (path != "other" and path not in OPEN) or status >= 400:
            shown = {"id": identity, "method": scope["method"], "path": path, "status": status}
            log.info("request", extra={"facts": {**shown, "seconds": round(seconds, 4), **facts}})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once more, then whatever else arrives."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def answer(refused: Refused) -> JSONResponse:
    """The response to a request that is refused."""
    return JSONResponse(refused.document(), refused.status, refused.headers())


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the facts of the record."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        shown = {"time": f"{when}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        shown |= {"event": record.getMessage(), **getattr(record, "facts", {})}
        if record.exc_info:
            shown["trace"] = self.formatException(record.exc_info)
        return json.dumps(shown)
