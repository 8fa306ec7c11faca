"""One page that opens from disk: the figures, the numbers behind them and the chains of thought."""

from __future__ import annotations

import base64
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from thinkfast.data.problems import Problem
from thinkfast.errors import BadInput
from thinkfast.records import write_text
from thinkfast.report import words
from thinkfast.report.figures import TITLES, Drawing, drawings, inline_svg, lap, plot_box, slot, write_files
from thinkfast.report.load import Curves, Run, Sample, Values, load_run

TEXT_CHARACTERS = 3_800_000
MAX_ROWS = 40_000
GLYPHS = ("■●▲◆▼✚", "□○△◇▽✛")
RECORD_FIELDS = {
    "command": "Command",
    "machine": "Machine",
    "code": "Version",
    "versions": "Libraries",
    "settings": "Settings",
    "seed": "Seed",
    "started": "Started",
    "ended": "Ended",
}


def write_report(run_dir: Path, out_dir: Path, shown: int = 60) -> Path:
    """Write `index.html` and every figure as PNG and SVG into `out_dir`; returns the page's path.

    `shown` problems are browsable with their samples, evenly spaced in file order. Chains of thought beyond about
    4 MB are left out of the page, latest first; their votes stay. Raises `BadInput` naming file and field.
    """
    run = load_run(run_dir, shown)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{out_dir}: cannot be made a directory ({error.__class__.__name__})") from None
    figures = drawings(run)
    text = render(run, figures)
    for drawing in figures:
        write_files(drawing, out_dir)
    page = out_dir / "index.html"
    write_text(page, text)
    return page


def render(run: Run, figures: list[Drawing]) -> str:
    """The page as text."""
    here = resources.files("thinkfast.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": words.percent,
        "points": words.points,
        "seconds": words.seconds,
        "count": words.count,
    }
    template = environment.from_string((here / "page.html.jinja").read_text(encoding="utf-8"))
    plots, headline = _plots(run, figures), words.headline(run)
    browser = _browser(run)
    data = {"browser": browser, "plots": {name: plot["data"] for name, plot in plots.items()}}
    return template.render(
        run=run,
        browsable=len(browser["problems"]),
        curves=run.curves,
        headline=headline,
        race=_race(run, headline),
        budgets=words.budgets(run),
        speed_words=words.speed(run),
        method=words.method(run),
        record=_record(run),
        models=_models(run),
        speed=_speed_rows(run),
        figures={drawing.name: _inline(drawing) for drawing in figures},
        plots=plots,
        titles=TITLES,
        kinds={model: words.kind(run, model) for model in run.curves.models},
        slots={model: slot(run, model) for model in run.curves.models},
        glyphs={model: _glyph(run, model) for model in run.curves.models},
        css=Markup((here / "page.css").read_text(encoding="utf-8")),
        downloads=downloads(run),
        scored=any(name in plots for name in ("weighted_time", "best_of_n_time")),
        js=Markup((here / "page.js").read_text(encoding="utf-8")),
        data=Markup(_script_json(data)),
    )


def _glyph(run: Run, model: str) -> str:
    """A model's mark; hollow where its colour is taken a second time."""
    return GLYPHS[lap(run, model) % len(GLYPHS)][slot(run, model)]


def _inline(drawing: Drawing) -> Markup:
    return Markup(inline_svg(drawing, narrow=False) + inline_svg(drawing, narrow=True))


def _script_json(value: Any) -> str:
    """JSON that can stand in a script element: no character of it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (
        text.replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )


def _rounded(values: Values) -> Values:
    return [None if value is None or math.isnan(value) else round(value, 4) for value in values]


def _plots(run: Run, figures: list[Drawing]) -> dict[str, dict[str, Any]]:
    """The readable figures: their data for the page's script, and a sentence for those who cannot see them."""
    by_name = {drawing.name: drawing for drawing in figures}
    curves, plots = run.curves, {}
    for axis, table, x in (("time", curves.by_time, curves.seconds), ("k", curves.by_k, curves.k)):
        for metric in curves.metrics(table) if x else ():
            drawing = by_name[f"{metric}_{axis}"]
            ends = [f"{m} {words.percent(table[m].metric(metric).mean[-1])}" for m in curves.models]
            where = words.seconds(curves.seconds[-1]) if axis == "time" else f"k = {curves.k[-1]}"
            series = [_series(table[model], metric, model) for model in curves.models]
            plots[drawing.name] = {
                "label": f"{TITLES[metric]} against {'seconds' if axis == 'time' else 'samples'} per problem"
                f"; at {where}: {', '.join(ends)}.",
                "data": {
                    "x": list(x),
                    "unit": "s" if axis == "time" else "k",
                    "wide": plot_box(drawing, narrow=False),
                    "narrow": plot_box(drawing, narrow=True),
                    "series": series,
                },
                "rows": [
                    (place, [(one["mean"][i], one["low"][i], one["high"][i]) for one in series])
                    for i, place in enumerate(x)
                ],
            }
    return plots


def _series(curves: Curves, metric: str, model: str) -> dict[str, Any]:
    curve = curves.metric(metric)
    samples = None if curves.samples is None else _rounded(curves.samples)
    numbers = {"mean": _rounded(curve.mean), "low": _rounded(curve.low), "high": _rounded(curve.high)}
    return {"model": model, "samples": samples} | numbers


def downloads(run: Run) -> dict[str, Markup]:
    """All plotted curves as one table, a row a point: the bytes of a CSV and of a Parquet file, as data URIs."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    rows = [
        {"axis": axis, "x": float(x[i]), "model": model, "measure": metric}
        | {name: getattr(curve, name)[i] for name in ("mean", "low", "high")}
        | {"samples": samples[i] if samples else None}
        for axis, table, x in (
            ("seconds", run.curves.by_time, run.curves.seconds),
            ("k", run.curves.by_k, run.curves.k),
        )
        for model in run.curves.models
        for metric in run.curves.metrics(table)
        for curve, samples in [(table[model].metric(metric), table[model].samples)]
        for i in range(len(x))
    ]
    kinds = dict.fromkeys(("x", "mean", "low", "high", "samples"), pyarrow.float64())
    schema = pyarrow.schema({"axis": pyarrow.string(), "x": kinds["x"], "model": pyarrow.string()})
    for name in ("measure", "mean", "low", "high", "samples"):
        schema = schema.append(pyarrow.field(name, kinds.get(name, pyarrow.string())))
    plotted = pyarrow.Table.from_pylist(rows, schema=schema)
    found = {}
    for kind, mime, write in (
        ("csv", "text/csv", pyarrow.csv.write_csv),
        ("parquet", "application/vnd.apache.parquet", pyarrow.parquet.write_table),
    ):
        sink = pyarrow.BufferOutputStream()
        write(plotted, sink)
        found[kind] = Markup(f"data:{mime};base64,{base64.b64encode(sink.getvalue()).decode()}")
    return found


def _race(run: Run, headline: words.Headline) -> list[dict[str, Any]]:
    """How many samples each model has drawn at the headline's budget, as dots; a dot stands for `each` samples."""
    curves = run.curves
    index = min(range(len(curves.seconds)), key=lambda i: abs(curves.seconds[i] - headline.seconds))
    counts = {}
    for model in curves.models:
        samples = curves.by_time[model].samples
        count = samples[index] if samples else None
        if count is None:
            return []
        counts[model] = count
    each = max(1, math.ceil(max(counts.values()) / 48))
    rows = []
    for model, count in counts.items():
        share = curves.by_time[model].metric(headline.metric).mean[index]
        part, whole = math.modf(count / each)
        dots = {"each": each, "whole": int(whole), "part": round(100 * part)}
        rows.append({"model": model, "count": count, "share": share} | dots)
    return rows


def _models(run: Run) -> list[dict[str, Any]]:
    """The table of models: the summary's figure where it has one, else the one counted from the samples."""
    rows = []
    for model in run.curves.models:
        said, counted = run.summary.models.get(model, {}), run.sampled[model]
        last = (run.curves.by_k if run.curves.k else run.curves.by_time)[model].majority.mean[-1]
        rows.append(
            {
                "name": model,
                "pass1": said.get("pass@1", counted.pass_at_1),
                "majority": said.get("majority", last),
                "speed": said.get("tokens_per_second", counted.tokens_per_second),
                "length": counted.mean_tokens,
                "cut": counted.cut,
                "samples": counted.samples,
                "train_tokens": said.get("train_tokens"),
                "kl": said.get("kl"),
            }
        )
    for row in rows:
        for field, value in row.items():
            if field != "name" and value is not None and not isinstance(value, int | float):
                raise BadInput(f"{run.path / 'summary.json'}: models.{row['name']}.{field}: expected a number")
    return rows


def _speed_rows(run: Run) -> list[dict[str, Any]]:
    """Tokens per second, a row for each (batch, context), a column for each model."""
    table = {(row.batch, row.context, row.model): row.tokens_per_second for row in run.bench}
    keys = sorted({(batch, context) for batch, context, model in table if model in run.curves.models})
    return [
        {"batch": batch, "context": context, "values": {m: table.get((batch, context, m)) for m in run.curves.models}}
        for batch, context in keys
    ]


def _record(run: Run) -> list[tuple[str, str]]:
    """What the record of the samples says about command, machine, versions and settings, as label and text."""
    record = dict(run.record)
    machine = record.get("machine")
    if isinstance(machine, dict) and isinstance(machine.get("memory_bytes"), int):
        memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
        record["machine"] = {k: v for k, v in machine.items() if k != "memory_bytes"} | {"memory": memory}
    found = [(label, _flat(record[key])) for key, label in RECORD_FIELDS.items() if record.get(key) is not None]
    return [(label, text) for label, text in found if text]


def _flat(value: Any) -> str:
    """A value of a record as text; a mapping as `key value` pairs."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items() if item is not None)
    return " ".join(_flat(item) for item in value) if isinstance(value, list) else str(value)


def _browser(run: Run) -> dict[str, Any]:
    """What the problem browser needs: a row a sample, and as many chains of thought as fit, the earliest first.

    The clock opens at `start`, the middle of the grid. A row is [seconds per problem, answer class, 1 if right, tokens,
    1 if cut at the length limit, answer, sample index, and the reward where there is one].
    """
    curves = run.curves
    rows = sum(len(samples) for model in curves.models for samples in run.sampled[model].shown.values())
    problems = run.problems[:: max(1, math.ceil(rows / MAX_ROWS))]
    entries = [_entry(run, problem) for problem in problems]
    left = TEXT_CHARACTERS
    longest = max((len(part) for entry in entries for part in entry["rows"]), default=0)
    for rank in range(longest):
        for entry, problem in zip(entries, problems, strict=True):
            for place, model in enumerate(curves.models):
                samples = run.sampled[model].shown[problem.id]
                if rank < len(samples) and left > 0:
                    left -= len(samples[rank].row.text.encode())
                    entry["texts"][place].append(samples[rank].row.text)
    return {
        "models": [{"name": m, "slot": slot(run, m), "glyph": _glyph(run, m)} for m in curves.models],
        "low": curves.seconds[0],
        "high": max(curves.seconds[-1], curves.seconds[0] * 1.01),
        "start": curves.seconds[len(curves.seconds) // 2],
        "problems": entries,
    }


def _entry(run: Run, problem: Problem) -> dict[str, Any]:
    models = run.curves.models
    return {
        "id": problem.id,
        "problem": problem.problem,
        "answer": problem.answer,
        "level": problem.level,
        "solution": problem.solution,
        "rows": [[_sample_row(run, s) for s in run.sampled[model].shown[problem.id]] for model in models],
        "texts": [[] for _ in models],
    }


def _sample_row(run: Run, sample: Sample) -> list[Any]:
    row, grade, reward = sample
    tau = float(f"{row.t_end / run.curves.problems:.6g}")
    cut = int(row.finish_reason == "length")
    said = [] if reward is None else [float(f"{reward:.5g}")]
    return [tau, grade.answer_class, int(grade.correct), row.token_count, cut, grade.answer, row.sample_index, *said]
