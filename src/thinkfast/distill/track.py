"""Training curves for TensorBoard, besides metrics.jsonl which is always written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from thinkfast.distill.trainer import Row
from thinkfast.errors import BadInput

SHOWN = ("loss", "lr", "grad_norm", "tokens")


def track(directory: Path) -> Callable[[Row], None]:
    """A function that adds a row of metrics.jsonl to the TensorBoard log in `directory`, one curve a stage and number.

    Raises BadInput when TensorBoard is not installed.
    """
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
