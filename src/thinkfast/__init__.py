"""Distils a pretrained Transformer into a Mamba or hybrid student, and compares the two at equal measured time."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "BadInput": "thinkfast.errors",
    "Decoder": "thinkfast.model.decoder",
    "Engine": "thinkfast.engine.engine",
    "Sample": "thinkfast.engine.sampling",
    "SamplingParams": "thinkfast.engine.sampling",
    "best_of_n": "thinkfast.scale.aggregate",
    "convert": "thinkfast.student.convert",
    "equivalent": "thinkfast.scale.grade",
    "load_model": "thinkfast.model.checkpoint",
    "load_recipe": "thinkfast.recipe",
    "majority_vote": "thinkfast.scale.aggregate",
    "pass_at_k": "thinkfast.scale.estimate",
    "run_recipe": "thinkfast.pipeline",
    "save_model": "thinkfast.model.checkpoint",
}

__all__ = [
    "BadInput",
    "Decoder",
    "Engine",
    "Sample",
    "SamplingParams",
    "best_of_n",
    "convert",
    "equivalent",
    "load_model",
    "load_recipe",
    "majority_vote",
    "pass_at_k",
    "run_recipe",
    "save_model",
]


def __getattr__(name: str) -> object:
    """Loads a public name from its home on first use, so that `import thinkfast` stays quick and free of torch."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'thinkfast' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
