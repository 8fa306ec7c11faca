"""The processes that `torchrun` started together, seen from one of them; one process alone needs none of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
STARTED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"


@dataclass
class Team:
    """The processes of a run. `together`: torchrun started them, even if there is only one. `pair`: the root under
    which the models are sharded, if they are."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    together: bool = False
    pair: nn.Module | None = None

    def deal(self, step: Sequence[T]) -> list[tuple[T, int]]:
        """This process's batches of a step, each with its weight, 1. Where they cannot be dealt out evenly some
        processes repeat the first with weight 0: all must compute equally often."""
        mine = [(batch, 1) for batch in step[self.rank :: self.size]]
        return mine + [(step[0], 0)] * (-(-len(step) // self.size) - len(mine))

    def call(self, compute: Callable[[], T]) -> T:
        """What `compute` gives, with the weights at hand that it needs. All processes must call it in step."""
        if self.pair is None:
            return compute()
        result: T = self.pair(compute)
        return result

    def total(self, value: float) -> float:
        """The sum over all processes."""
        if not self.together:
            return value
        import torch

        summed = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(summed)
        return float(summed)

    def agree(self, value: Any) -> Any:
        """What the first process holds, on every one of them."""
        if not self.together:
            return value
        from torch import distributed

        holder = [value]
        distributed.broadcast_object_list(holder)
        return holder[0]

    def collect(self, values: list[T]) -> list[T]:
        """The values of every process, on every one of them."""
        if not self.together:
            return values
        from torch import distributed

        found: list[list[T]] = [[] for _ in range(self.size)]
        distributed.all_gather_object(found, values)
        return [value for part in found for value in part]

    def wait(self) -> None:
        """Returns when every process has come here."""
        self.total(0.0)


_team = Team()


def current() -> Team:
    """The team of this process: one at a time, as there is one process group."""
    return _team


@contextmanager
def gathered() -> Iterator[Team]:
    """Joins the team that `torchrun` started this process in, on the GPU of its local rank or else on the CPU; without
    `torchrun` a team of one that is not `together`. Leaves it at the end."""
    global _team
    if STARTED_BY_TORCHRUN not in os.environ:
        yield _team
        return
    import torch

    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    # The others wait while the first one tokenises.
    torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    try:
        _team = Team(torch.distributed.get_rank(), torch.distributed.get_world_size(), device, together=True)
        yield _team
    finally:
        _team = Team()
        torch.distributed.destroy_process_group()
