"""`thinkfast serve`: loads the models, binds, serves, and hands back what runs when told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from thinkfast.errors import BadInput

if TYPE_CHECKING:
    from thinkfast.serve.app import Limits

GRACE = 10.0
SWITCH_SECONDS = 0.0001
CONNECTIONS = 1024


def limits(prompt: int, answer: int, n: int, budget: str, queue: int) -> Limits:
    """Limits from the command's options. Raises BadInput, also where the server's libraries are not installed."""
    try:
        from thinkfast.serve.app import Limits
    except ImportError as error:
        raise BadInput(
            f"{error.name} is missing, expected the server's libraries: pip install 'thinkfast[serve]'"
        ) from error
    from thinkfast.serve.draw import seconds_of

    return Limits(prompt, answer, n, budget=seconds_of(budget), queue=queue)


def serve_models(
    directories: Sequence[Path],
    host: str,
    port: int,
    slots: int,
    limits: Limits,
    keys_file: Path | None = None,
    reward: Path | None = None,
    log_prompts: bool = False,
) -> None:
    """Serves until SIGINT or SIGTERM; then takes nothing new and gives every open request 10 seconds to finish.

    What has not finished by then is answered with what it has. A second signal ends at once.
    reward: a reward model that `best_of_n` and `weighted` rank by.
    Raises BadInput for a directory that is no model, a broken key file, a public address without keys, and an address
    that cannot be bound.
    """
    import uvicorn

    from thinkfast.serve.app import create_app
    from thinkfast.serve.draw import open_model
    from thinkfast.serve.judge import open_judge
    from thinkfast.serve.keys import load_keys

    if slots < 1:
        raise BadInput(f"slots is {slots}, expected 1 or more")
    keys = None if keys_file is None else load_keys(keys_file)
    listener = bind(host, port, keys is not None)
    # The engine's thread needs Python only between steps; it should not wait long for it.
    sys.setswitchinterval(SWITCH_SECONDS)
    log = logging.getLogger("thinkfast.serve")
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        stack.enter_context(_lines_on_stderr())
        models = []
        for directory in directories:
            models.append(open_model(directory, slots, limits.prompt + limits.answer))
            stack.callback(models[-1].live.close)
        judge = None if reward is None else open_judge(reward)
        if judge is not None:
            stack.callback(judge.close)
        app = create_app(models, limits, keys, judge, log_prompts)
        stack.callback(app.state.desk.grader.close)
        config = uvicorn.Config(
            app,
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=int(GRACE) + 5,
        )

        class Server(uvicorn.Server):
            """Tells the engines to hand back what they have, and leaves the process its exit status."""

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                if self.should_exit:
                    self.force_exit = True
                self.should_exit = True

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                log.info("stopping", extra={"facts": {"open": len(app.state.desk.open)}})
                app.state.desk.hand_back(GRACE)
                await super().shutdown(sockets)

        address = listener.getsockname()
        where = f"[{address[0]}]" if listener.family == socket.AF_INET6 else address[0]
        shown = {"address": f"http://{where}:{address[1]}", "models": [model.name for model in models]}
        log.info("serving", extra={"facts": shown})
        server = Server(config)
        # uvloop and httptools, where they are installed, take half of a request's time: it is the engine's time, too.
        with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(server.serve([listener]))
        log.info("stopped")


@contextlib.contextmanager
def _lines_on_stderr() -> Iterator[None]:
    """Logs of the server as JSON lines, for as long as it runs."""
    from thinkfast.serve.gate import JsonLines

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    levels = {logging.getLogger("thinkfast.serve"): logging.INFO, logging.getLogger("uvicorn.error"): logging.ERROR}
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in levels]
    for logger, level in levels.items():
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def bind(host: str, port: int, guarded: bool) -> socket.socket:
    """A listening socket. Raises BadInput, also for an address beyond this machine where no keys guard it."""
    if not 0 <= port < 65536:
        raise BadInput(f"port is {port}, expected 0 (any) to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise BadInput(f"host {host!r}: {error}") from error
    if not guarded and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise BadInput(f"host {host!r} can be reached from other machines: expected --keys FILE with API keys")
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(CONNECTIONS)
    except OSError as error:
        listener.close()
        raise BadInput(f"{host}:{port} cannot be bound: {error.strerror}") from error
    return listener
