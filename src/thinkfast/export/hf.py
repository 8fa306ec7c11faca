"""A model as a Hugging Face directory that stock engines load, checked before it gets its name."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from thinkfast.errors import BadInput
from thinkfast.export.card import model_card, run_of
from thinkfast.export.parity import Differs, check, require_transformers
from thinkfast.model.checkpoint import GENERATION, load_model, save_model
from thinkfast.model.config import MAMBA, DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.model.layout import check_stock
from thinkfast.records import Failed, read_json, write_json, write_text

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MORE_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "LICENSE", "LICENSE.txt", "NOTICE")


def export_hf(source: Path, out: Path, dtype: str | None = None, compat: bool = False) -> dict[str, Any]:
    """Writes `source` to the new directory `out`; returns paths, the figures of the parity check and warnings.

    dtype: "float32", "float16" or "bfloat16", by default that of `source`. compat: only what transformers before 5.23
    reads right as well. Raises BadInput for what the layout cannot express or an `out` that exists, Failed when
    `transformers` computes something else.
    """
    if out.exists():
        raise BadInput(f"{out} exists, expected a new directory")
    require_transformers()
    wanted, stored = torch_dtype(dtype or stored_dtype(source)), torch_dtype(stored_dtype(source))
    model = load_model(source)
    warnings = examine(model.config, source, compat)
    if torch.promote_types(wanted, stored) != wanted:
        warnings.append(f"rounded from {dtype_name(stored)} to {dtype_name(wanted)}; what was measured was before that")
    to_dtype(model, wanted)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.part")
    if staging.exists():
        shutil.rmtree(staging)
    try:
        save_model(model, staging, tokenizer_from=source)
        del model
        for name in MORE_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        write_json(staging / GENERATION, _generation(source, staging))
        if not (staging / "tokenizer.json").exists():
            warnings.append("there was no tokenizer.json, so there is no tokenizer")
        try:
            parity = asdict(check(staging))
        except Differs as error:
            raise Failed(str(error).replace(str(staging), str(out))) from None
        write_text(staging / "README.md", model_card(source, staging, out.name, parity, warnings))
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {"out": str(out), "format": "hf", "dtype": dtype_name(wanted), "parity": parity, "warnings": warnings}


def examine(config: DecoderConfig, source: Path, compat: bool) -> list[str]:
    """Refuses what dense GraniteMoeHybrid cannot express; says which readers would read the rest wrong."""
    mamba = config.mamba
    if MAMBA not in config.layer_types or mamba is None:
        return []
    check_stock(config, f"{source}: ")
    if mamba.n_groups == 1:
        return []
    if compat:
        raise BadInput(
            f"{source}: {mamba.n_groups} groups, which transformers before 5.23 norm as one: no other form of the "
            "weights makes up for it, so --compat needs a student with one group (LayerPlan's n_groups=1); without "
            "--compat transformers 5.23, vLLM, SGLang and llama.cpp read it right"
        )
    return [
        f"{mamba.n_groups} groups: transformers before 5.23 and other readers that norm over all groups at once "
        "compute wrong logits without an error; vLLM, SGLang, llama.cpp and transformers from 5.23 are right"
    ]


def torch_dtype(name: str) -> torch.dtype:
    """A dtype of safetensors by its name."""
    if name not in DTYPES:
        raise BadInput(f"dtype is {name!r}, expected one of {', '.join(DTYPES)} for the format hf")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def stored_dtype(source: Path) -> str:
    """The dtype that config.json names, float32 where it names none that is known."""
    file = source / "config.json"
    raw = read_json(file) if file.is_file() else {}
    name = (raw.get("dtype") or raw.get("torch_dtype")) if isinstance(raw, dict) else None
    return name if name in DTYPES else "float32"


def to_dtype(model: Decoder, dtype: torch.dtype) -> None:
    """Casts in place. Raises BadInput where a weight is too large for float16."""
    model.to(dtype)
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise BadInput(f"{name} holds values that are not finite in {dtype_name(dtype)}, choose another dtype")


def _generation(source: Path, staging: Path) -> dict[str, Any]:
    """Token ids from the model, how to sample from the source's file or from the run that the model was made in."""
    written: dict[str, Any] = json.loads((staging / GENERATION).read_text())
    file = source / GENERATION
    given = read_json(file) if file.is_file() else {}
    kept = {key: value for key, value in given.items() if not key.startswith("_") and key != "transformers_version"}
    sampled = _sampled(source)
    return {**sampled, **kept, **{key: value for key, value in written.items() if not key.startswith("_")}}


def _sampled(source: Path) -> dict[str, Any]:
    """The sampling parameters of the run around `source`, as RUN/samples/NAME/run.json notes them."""
    file = run_of(source) / "samples" / source.resolve().name / "run.json"
    settings = read_json(file).get("settings", {}) if file.is_file() else {}
    temperature = settings.get("temperature")
    if not isinstance(temperature, int | float) or temperature <= 0:
        return {}
    return {"do_sample": True, "temperature": float(temperature), "top_p": float(settings.get("top_p", 1.0))}
