import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from thinkfast.data.tokenizer import load_tokenizer, save_word_tokenizer
from thinkfast.model.checkpoint import save_model
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_configure() -> None:
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    torch.set_num_threads(1)  # the suite itself runs on every core


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock directory of a random Transformer with two layers that reads the word problems. Do not write into it."""
    root = tmp_path_factory.mktemp("tiny")
    save_word_tokenizer(root / "words")
    words = load_tokenizer(root / "words")
    config = DecoderConfig(
        vocab_size=words.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        layer_types=(ATTENTION,) * 2,
        max_position_embeddings=512,
        eos_token_ids=(words.eos_id,),
        pad_token_id=words.pad_id,
    )
    torch.manual_seed(5)
    save_model(Decoder(config), root / "teacher", tokenizer_from=root / "words")
    return root / "teacher"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser of this machine, opened through playwright, which the modules that ask for it import."""
    from playwright.sync_api import sync_playwright

    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH; `.ci/run` installs chromium")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield opened
        opened.close()
