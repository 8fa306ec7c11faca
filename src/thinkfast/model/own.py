"""thinkfast's own layout, for decoders that no stock one expresses: every field of the shape, tensors as they are
called here.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import torch

from thinkfast.errors import BadInput
from thinkfast.model.config import TITLES, DecoderConfig, MambaConfig, RopeScaling

OWN = "thinkfast"
NESTED = {"mamba": MambaConfig, "rope_scaling": RopeScaling}


def dump_own(config: DecoderConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a decoder."""
    eos = list(config.eos_token_ids)
    raw = {"model_type": OWN, **asdict(config), "dtype": str(dtype).removeprefix("torch.")}
    return raw | {"eos_token_id": eos[0] if len(eos) == 1 else eos or None}


def parse_own(raw: dict[str, Any], where: str) -> DecoderConfig:
    """The inverse of `dump_own`. Raises BadInput naming `where` and the field that is missing or wrong."""
    values: dict[str, Any] = {}
    for field in fields(DecoderConfig):
        if field.name not in raw:
            raise BadInput(f"{where}: {field.name} is missing")
        value = raw[field.name]
        if field.name in NESTED and value is not None:
            value = _nested(NESTED[field.name], value, f"{where}: {field.name}")
        values[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        config = DecoderConfig(**values)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{where}: {error}") from None
    if config.mamba is not None and config.mamba.kind not in TITLES:
        raise BadInput(f"{where}: mamba.kind is {config.mamba.kind!r}, expected one of {', '.join(TITLES)}")
    return config


def _nested(kind: type[Any], value: Any, where: str) -> Any:
    known = {field.name for field in fields(kind)}
    if not isinstance(value, dict) or value.keys() != known:
        raise BadInput(f"{where} is {value!r}, expected an object with {', '.join(sorted(known))}")
    return kind(**value)
