"""Training curves for TensorBoard or Weights & Biases, besides metrics.jsonl which is always written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from thinkfast.distill.trainer import Row
from thinkfast.errors import BadInput

SHOWN = ("loss", "lr", "grad_norm", "tokens")
Log = Callable[[Row], None]
"""Takes a row of metrics.jsonl; one curve a stage and number."""


def tensorboard(directory: Path) -> Log:
    """A log for TensorBoard in `directory`. Raises BadInput when TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput(
            "watch.tensorboard: TensorBoard is not installed, expected pip install 'thinkfast[track]'"
        ) from None
    writer = SummaryWriter(str(directory))

    def log(row: Row) -> None:
        for name in SHOWN:
            writer.add_scalar(f"{row['stage']}/{name}", row[name], row["step"])
        writer.flush()

    return log


def weights_and_biases(directory: Path, name: str) -> Log:
    """A run called `name` of the project "thinkfast", its files in `directory`; where it goes, if anywhere, is said by
    the environment (WANDB_MODE=offline keeps it here). Raises BadInput when wandb is not installed or refuses."""
    try:
        import wandb
    except ImportError:
        raise BadInput("watch.wandb: wandb is not installed, expected pip install 'thinkfast[wandb]'") from None
    directory.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(project="thinkfast", name=name, dir=str(directory))
    except wandb.errors.Error as error:
        raise BadInput(f"watch.wandb: {str(error).splitlines()[0]}") from None

    def log(row: Row) -> None:
        # Every stage counts its own steps: a number beside the others, for wandb's own step never goes back.
        run.log({f"{row['stage']}/{shown}": row[shown] for shown in (*SHOWN, "step")})

    return log


def both(first: Log | None, second: Log | None) -> Log | None:
    """One log out of two, each of which may be missing."""
    if first is None or second is None:
        return first or second

    def log(row: Row) -> None:
        first(row)
        second(row)

    return log
