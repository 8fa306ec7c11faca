"""Measured speeds as a picture: tokens a second against context, one line a model, the machine's limit dashed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_speeds(document: Mapping[str, Any], out: Path) -> None:
    """Writes a PNG with one panel a batch, of the rows of `decode_speeds` in which nothing is shared."""
    rows = [row for row in document["rows"] if not row["shared"]]
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(4.8 * max(len(batches), 1), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for place, batch in enumerate(batches):
        axes = figure.add_subplot(1, len(batches), place + 1)
        for index, model in enumerate(sorted({row["model"] for row in rows})):
            line = sorted(
                (r["context"], r["tokens_per_second"], r["share"])
                for r in rows
                if (r["model"], r["batch"]) == (model, batch)
            )
            if not line:
                continue
            contexts, speeds, shares = zip(*line, strict=True)
            color = f"C{index}"
            axes.plot(contexts, speeds, "o-", color=color, label=model)
            axes.plot(contexts, [a / b for a, b in zip(speeds, shares, strict=True)], "--", color=color, linewidth=1)
        axes.set(xscale="log", yscale="log", title=f"batch {batch}", xlabel="context", ylabel="tokens a second")
        axes.legend(fontsize=7)
    figure.suptitle(
        f"{document['machine']['cpu']}, {document['machine']['threads']} threads; dashed: the machine's limit",
        fontsize=9,
    )
    figure.savefig(out, dpi=120)
