"""Real models whose text is known: a chain of words, an answer, the end. And a real server around them."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from thinkfast.data.tokenizer import load_tokenizer, save_word_tokenizer
from thinkfast.model.checkpoint import load_model, save_model
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.scale.verifier import Verifier, VerifierSettings, save_verifier, step_ends
from thinkfast.serve.app import Limits, create_app
from thinkfast.serve.draw import Served, open_model
from thinkfast.serve.judge import Judge
from thinkfast.serve.keys import Keys

NEVER = -40.0
ENDLESS = 200_000  # tokens of one chain that no machine draws within a budget of a test
PATIENCE = 120.0  # seconds until a test that waits for an event is given up
Serve = Callable[..., str]
Wait = Callable[[Callable[[], bool]], None]


def write_talker(directory: Path, stay: float, right: float = 0.7, room: int = 2048) -> Path:
    """A Transformer that is a Markov chain: "Notes" again and again with probability `stay`, then "#### 7" or "#### 8".

    Its blocks add nothing and its embedding is the identity, so that a token's logits are a column of the head.
    """
    save_word_tokenizer(directory / "words")
    words = load_tokenizer(directory / "words")
    width = 2 * math.ceil(words.vocab_size / 2)
    config = DecoderConfig(
        vocab_size=words.vocab_size,
        hidden_size=width,
        intermediate_size=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        layer_types=(ATTENTION,),
        max_position_embeddings=room,
        eos_token_ids=(words.eos_id,),
        pad_token_id=words.pad_id,
        tie_word_embeddings=False,
    )
    model = Decoder(config)
    (filler,), (hashes,), (seven,), (eight,) = (words.encode(text) for text in ("Notes", "####", " 7", " 8"))
    chance = torch.full((words.vocab_size, words.vocab_size), NEVER)
    chance[filler, :] = 0.0  # whatever the prompt ends with
    chance[:, filler] = NEVER
    chance[filler, filler], chance[hashes, filler] = math.log(stay), math.log(1 - stay)
    for token, following in ((hashes, {seven: right, eight: 1 - right}), (seven, {words.eos_id: 1.0})):
        chance[:, token] = NEVER
        for other, probability in following.items():
            chance[other, token] = math.log(probability)
    chance[:, eight] = chance[:, seven]
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" not in name:
                value.zero_()
        model.embed_tokens.weight.copy_(torch.eye(words.vocab_size, width))
        model.head_weight[:, : words.vocab_size] = chance / math.sqrt(width)
    save_model(model, directory / "model", tokenizer_from=directory / "words")
    return directory / "model"


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 tokens a chain."""
    return write_talker(tmp_path_factory.mktemp("talker"), stay=0.95)


@pytest.fixture(scope="session")
def rambler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never comes to an end."""
    return write_talker(tmp_path_factory.mktemp("rambler"), stay=1 - 1e-9)


@pytest.fixture(scope="session")
def contrary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verifier that is sure of the rarer answer, 8."""
    root = tmp_path_factory.mktemp("contrary")
    model = write_talker(root, stay=1 - 1e-9, right=0.001)
    decoder, tokenizer = load_model(model), load_tokenizer(model)
    verifier = Verifier(decoder, step_ends(tokenizer, decoder.config.vocab_size))
    save_verifier(verifier, root / "verifier", model, VerifierSettings())
    return root / "verifier"


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not one of its chains ends within any budget."""
    return write_talker(tmp_path_factory.mktemp("endless"), stay=1 - 1e-15, room=ENDLESS)


@pytest.fixture(scope="session")
def unending(endless: Path) -> Iterator[Served]:
    """That model, opened."""
    opened = open_model(endless, 4, ENDLESS, "endless")
    yield opened
    opened.live.close()


@pytest.fixture(scope="session")
def models(talker: Path, rambler: Path) -> Iterator[list[Served]]:
    opened = [open_model(talker, 8, 1024, "talker"), open_model(rambler, 8, 1024, "rambler")]
    yield opened
    for served in opened:
        served.live.close()


@contextlib.contextmanager
def served(
    models: list[Served],
    limits: Limits | None = None,
    keys: Keys | None = None,
    judge: Judge | None = None,
    log_prompts: bool = False,
) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    app = create_app(models, limits, keys, judge, log_prompts)
    server = uvicorn.Server(uvicorn.Config(app, port=0, ws="none", log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        app.state.desk.grader.close()


@pytest.fixture(scope="session")
def address(models: list[Served]) -> Iterator[str]:
    """The server most tests ask."""
    with served(models, Limits(prompt=300, answer=700, n=8, budget=20.0, queue=32)) as found:
        yield found


@pytest.fixture
def serve(models: list[Served], unending: Served) -> Iterator[Serve]:
    """Servers of one's own."""
    with contextlib.ExitStack() as stack:

        def start(limits: Limits | None = None, keys: Keys | None = None, *more: Served, **options: Any) -> str:
            return stack.enter_context(served([*models, unending, *more], limits, keys, **options))

        yield start


@pytest.fixture(scope="session")
def wait_until() -> Wait:
    """Waits for something that happens on any machine, sooner or later."""

    def wait(true: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < until
            time.sleep(0.005)

    return wait
