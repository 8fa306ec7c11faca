"""Whether `transformers` computes from a directory what thinkfast computes: logits, generation, padding, saving.

Also a program, `python -m thinkfast.export.parity DIRECTORY...`, that needs only torch, safetensors and any
`transformers` with GraniteMoeHybrid: that is how other versions than the installed one are checked.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model
from thinkfast.model.decoder import Decoder

GROUPED_NORM_SINCE = (5, 23)
TOLERANCE = 1e-3
PROMPT, GENERATED, SEED = 48, 24, 20250228


class Differs(Exception):
    """The two disagree. The message is one line that says in what and by how much."""


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest absolute differences of logits, in the units of logits; `scale` is the largest logit met.

    logits: full forward. cached: generation with a cache against our full forward over the same tokens, `generated`
    of them. padded: left-padded rows against single ones. reloaded: after `save_pretrained`.
    """

    transformers: str
    scale: float
    logits: float
    cached: float
    generated: int
    padded: float
    reloaded: float


def installed_version() -> tuple[int, ...]:
    """The version of `transformers`, (0,) where there is none, without importing it."""
    try:
        return tuple(int(part) for part in metadata.version("transformers").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return (0,)


def require_transformers() -> None:
    """Raises BadInput where `transformers` is not installed."""
    if installed_version() == (0,):
        raise BadInput("transformers is not installed, which the parity check needs: pip install 'thinkfast[export]'")


@torch.no_grad()
def check(directory: str | Path) -> Parity:
    """Compares in float32 on random token ids. Raises Differs, BadInput where `transformers` is not installed."""
    require_transformers()
    path = Path(directory)
    ours = load_model(path)
    with _quiet() as transformers:
        stock = _load(path)
        config = ours.config
        length = min(PROMPT, config.max_position_embeddings // 2)
        ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(SEED))
        attend = torch.ones_like(ids)
        # A cache is asked for because the plain call makes one too, and pure models break just there.
        plain = stock(input_ids=ids, attention_mask=attend, use_cache=True).logits.float()
        wanted = ours(ids)
        scale = max(1.0, float(wanted.abs().max()))
        judge = _Judge(path, transformers.__version__, config.mamba.n_groups if config.mamba else 1, scale)
        logits = judge("the logits", plain, wanted)
        cached, generated = _generation(ours, stock, ids, judge)
        padded = _padding(stock, ids, plain, config.pad_token_id or 0, judge)
        with tempfile.TemporaryDirectory() as folder:
            stock.save_pretrained(folder)
            again = _load(Path(folder))(input_ids=ids, attention_mask=attend, use_cache=True).logits.float()
            reloaded = judge("the logits after saving", again, plain)
            _same_weights(ours, load_model(folder), path)
    return Parity(transformers.__version__, scale, logits, cached, generated, padded, reloaded)


@dataclass(frozen=True, slots=True)
class _Judge:
    """Refuses a difference of logits that rounding does not explain."""

    path: Path
    version: str
    groups: int
    scale: float

    def __call__(self, what: str, found: Tensor, wanted: Tensor) -> float:
        difference = float((found - wanted).abs().max())
        if difference <= TOLERANCE * self.scale:
            return difference
        reason = ""
        if self.groups > 1 and installed_version() < GROUPED_NORM_SINCE:
            reason = f": with {self.groups} groups it needs transformers 5.23, older ones norm over all groups at once"
        raise Differs(
            f"{self.path}: in transformers {self.version} {what} are off by {difference:.3g}, "
            f"expected at most {TOLERANCE * self.scale:.3g}{reason}"
        )


def _generation(ours: Decoder, stock: Any, ids: Tensor, judge: _Judge) -> tuple[float, int]:
    """Greedy tokens of `generate`, each of which must be the best of ours or as good within the tolerance."""
    row = ids[:1]
    drawn = stock.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=GENERATED, do_sample=False, use_cache=True
    )
    count = drawn.shape[1] - row.shape[1]
    logits = ours(drawn)[:, row.shape[1] - 1 : -1]
    taken = logits.gather(-1, drawn[:, row.shape[1] :, None]).squeeze(-1)
    return judge("the logits of greedy tokens", taken, logits.max(-1).values), count


def _padding(stock: Any, ids: Tensor, plain: Tensor, pad: int, judge: _Judge) -> float:
    """A row that is padded on the left beside one that is not."""
    short = ids.shape[1] // 2
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, short:] = ids[1, : ids.shape[1] - short]
    padded[1, :short], mask[1, :short] = pad, 0
    found = stock(input_ids=padded, attention_mask=mask, use_cache=True).logits.float()
    first = judge("the logits beside a padded row", found[0], plain[0])
    return max(first, judge("the logits of a padded row", found[1, short:], plain[1, : ids.shape[1] - short]))


def _same_weights(ours: Decoder, again: Decoder, path: Path) -> None:
    mine, theirs = ours.state_dict(), again.state_dict()
    changed = [name for name in mine if name not in theirs or not torch.equal(mine[name], theirs[name])]
    if changed or len(mine) != len(theirs):
        raise Differs(f"{path}: saved by transformers and read again, other weights: {', '.join(changed[:3])}")


def _load(path: Path) -> Any:
    """The stock model in float32, loaded strictly."""
    transformers: Any = importlib.import_module("transformers")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading.get(what):
            raise Differs(f"{path}: {what.replace('_', ' ')} in transformers: {', '.join(map(str, loading[what]))}")
    tokens = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**tokens)
    return model.eval()


@contextmanager
def _quiet() -> Iterator[Any]:
    """`transformers` without its notes on slow paths, which are wanted here."""
    transformers: Any = importlib.import_module("transformers")
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(before)
        if shown:
            logging.enable_progress_bar()


def main(directories: list[str]) -> int:
    """Prints one line of JSON for each directory; returns 1 when one of them differs."""
    status = 0
    for directory in directories:
        try:
            print(json.dumps({"directory": directory, **asdict(check(directory))}))
        except (Differs, BadInput) as error:
            print(json.dumps({"directory": directory, "error": str(error)}))
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
