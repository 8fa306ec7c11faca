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
    check_format(form)
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise BadInput(f"{above} is a file, expected a directory")
    if form == "hf":
        from thinkfast.export.hf import export_hf

        return export_hf(source, out, dtype, compat)
    if compat:
        raise BadInput("--compat is about transformers, expected the format hf")
    from thinkfast.export.gguf import export_gguf

    return export_gguf(source, out, dtype)


def plan_model(source: Path, form: str, dtype: str | None) -> tuple[dict[str, Any], str]:
    """What an export of a model takes in memory, as a document and in words; writes nothing.

    Raises BadInput for an unknown format or a dtype that it lacks, and for a model that it does not express.
    """
    from thinkfast.export.gguf import expressible, gguf_dtype
    from thinkfast.export.hf import dtype_name, examine, stored_dtype, torch_dtype
    from thinkfast.export.memory import plan
    from thinkfast.model.checkpoint import read_config

    check_format(form)
    config = read_config(source)
    if form == "gguf":
        return plan(expressible(config, source), gguf_dtype(dtype))
    examine(config, source, compat=False)
    return plan(config, dtype_name(torch_dtype(dtype or stored_dtype(source))))


def check_format(form: str) -> None:
    """Raises BadInput for what is not one of FORMATS."""
    if form not in FORMATS:
        raise BadInput(f"format is {form!r}, expected one of {', '.join(FORMATS)}")
