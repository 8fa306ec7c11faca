"""Training state on disk: everything that the next step depends on, replaced atomically."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thinkfast.data.corpus import Cursor
from thinkfast.errors import BadInput

Identity = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Counters:
    """Where a run stands: next batch, optimiser steps, real tokens, seconds, the first and the smoothed loss."""

    cursor: Cursor
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_loss: float = 0.0
    loss: float = 0.0


def save_state(
    path: Path, identity: Identity, counters: Counters, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Writes weights, optimiser, random state and counters. Killed at any moment, it leaves the old state or the new.

    `identity` holds what must be equal for the state to be continued.
    """
    document = {
        "identity": dict(identity),
        "counters": asdict(counters),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.random.get_rng_state(),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(document, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_state(path: Path, identity: Identity, model: nn.Module, optimizer: torch.optim.Optimizer) -> Counters | None:
    """Puts a saved state into `model`, `optimizer` and torch's random generator; None where nothing was saved.

    Raises BadInput when the file is damaged, was made with another identity, or belongs to a model of another shape.
    """
    if not path.exists():
        return None
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
        made, counters = document["identity"], document["counters"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise BadInput(f"{path}: not a training state ({type(error).__name__}); remove it to begin anew") from None
    check_identity(path, made, identity)
    try:
        model.load_state_dict(document["model"])
        optimizer.load_state_dict(document["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"{path}: belongs to another model ({str(error).splitlines()[0]})") from None
    torch.random.set_rng_state(document["random"])
    return counters_from(counters)


def check_identity(path: Path, made: Identity, identity: Identity) -> None:
    """Raises BadInput naming the first thing in which what a state was made with differs from what is asked for."""
    for key in {**identity, **made}:
        if made.get(key) != identity.get(key):
            raise BadInput(
                f"{path}: was made with {key} = {made.get(key)!r}, not {identity.get(key)!r}; "
                "remove it or choose another directory"
            )


def counters_from(document: dict[str, Any]) -> Counters:
    """Counters out of what `asdict` made of them."""
    return replace(Counters(**document), cursor=Cursor(**document["cursor"]))
