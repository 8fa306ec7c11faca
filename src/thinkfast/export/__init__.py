"""Students as stock checkpoints: Hugging Face directories and GGUF files that other engines run without custom code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thinkfast.errors import BadInput

FORMATS = ("hf", "gguf")


def export_model(source: Path, out: Path, form: str, dtype: str | None, compat: bool) -> dict[str, Any]:
    """Writes a model in one of FORMATS; see `export.hf.export_hf` and `export.gguf.export_gguf`.

    Raises BadInput for an unknown format, for `compat` with one that it does not concern, and for an `out` inside of a
    file.
    """
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise BadInput(f"{above} is a file, expected a directory")
    if form == "hf":
        from thinkfast.export.hf import export_hf

        return export_hf(source, out, dtype, compat)
    if form != "gguf":
        raise BadInput(f"format is {form!r}, expected one of {', '.join(FORMATS)}")
    if compat:
        raise BadInput("--compat is about transformers, expected the format hf")
    from thinkfast.export.gguf import export_gguf

    return export_gguf(source, out, dtype)


def plan_model(source: Path, form: str, dtype: str | None) -> tuple[dict[str, Any], str]:
    """What an export of a model takes in memory, as a document and in words; writes nothing.

    Raises BadInput for an unknown dtype, and for a model that no stock layout expresses.
    """
    from thinkfast.export.hf import stored_dtype
    from thinkfast.export.memory import WEIGHT_BYTES, plan
    from thinkfast.model.checkpoint import read_config
    from thinkfast.model.config import MAMBA
    from thinkfast.model.layout import check_stock

    chosen = dtype or ("bfloat16" if form == "gguf" else stored_dtype(source))
    if chosen not in WEIGHT_BYTES:
        raise BadInput(f"dtype is {chosen!r}, expected one of {', '.join(WEIGHT_BYTES)}")
    config = read_config(source)
    if MAMBA in config.layer_types:
        check_stock(config)
    return plan(config, chosen)
