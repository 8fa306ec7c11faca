"""The figures of a run: one drawing, in the colours of paper for files and in CSS variables for the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from thinkfast.report.load import METRICS, Curve, Curves, Run

# Dark on paper, each at least 3:1 against it and apart under deuteranopia, protanopia and tritanopia.
SERIES = ("#5f5a52", "#0a64a4", "#bd4a00", "#007a5a", "#9a3f86", "#7a6a00")
PAPER = {"ink": "#1f1d1a", "muted": "#6a655d", "rule": "#dcd6ca", "paper": "#fbfaf7"}
MARKERS = ("s", "o", "^", "D", "v", "P")
TITLES = {
    "coverage": "Coverage",
    "majority": "Majority vote",
    "weighted": "Weighted vote",
    "best_of_n": "Best of n",
}
LAPS = ("-", (0, (1, 1.2)), (0, (5, 1, 1, 1)))
WIDE, NARROW = (5.6, 3.7), (3.7, 3.3)


@dataclass(frozen=True, slots=True)
class Palette:
    """Colours of one rendering; `series[0]` is the baseline's."""

    ink: str
    muted: str
    rule: str
    paper: str
    series: tuple[str, ...]


def palette() -> Palette:
    """The colours of the figure files."""
    return Palette(**PAPER, series=SERIES)


def _marked() -> tuple[Palette, dict[str, str]]:
    """A palette of near-black colours that stand for CSS variables, and what each is replaced by."""
    names = [*PAPER, *(f"series-{index}" for index in range(len(SERIES)))]
    codes = {name: f"#0000{index + 1:02x}" for index, name in enumerate(names)}
    colours = Palette(**{name: codes[name] for name in PAPER}, series=tuple(codes[n] for n in names[len(PAPER) :]))
    return colours, {code: f"var(--{name})" for name, code in codes.items()}


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure that can be drawn in any size and palette. `height` multiplies the height of the size asked for."""

    name: str
    draw: Callable[[Figure, Palette, bool], None]
    wide: tuple[float, float] = WIDE
    narrow: tuple[float, float] = NARROW


def slot(run: Run, model: str) -> int:
    """A model's place in the palette: the baseline has the first, students follow in the order of the curves."""
    curves = run.curves
    return 0 if model == curves.baseline else 1 + curves.students.index(model) % (len(SERIES) - 1)


def lap(run: Run, model: str) -> int:
    """How often the palette was used up before this model: lines of one colour differ by their dashes."""
    return 0 if model == run.curves.baseline else run.curves.students.index(model) // (len(SERIES) - 1) % len(LAPS)


def _array(values: Sequence[float | None] | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([np.nan if value is None else value for value in values or ()], dtype=np.float64)


def _short(name: str, limit: int = 16) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _number(value: float, _position: int = 0) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _signed(value: float, _position: int = 0) -> str:
    """A difference of two shares in percentage points, with its sign."""
    points = round(value * 100)
    return f"{'+' if points > 0 else '−' if points < 0 else ''}{abs(points)}"


def _ticks(low: float, high: float, steps: Sequence[float], most: int) -> list[float]:
    """Ticks 1-2-5 (or the given steps) times powers of ten in [low, high], thinned to at most `most`."""
    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for choice in (steps, (1.0, 3.0), (1.0,)):
        found = [s * 10.0**e for e in exponents for s in choice if low * 0.999 <= s * 10.0**e <= high * 1.001]
        if len(found) <= most:
            break
    return found or [low, high]


def _frame(axes: Axes, colours: Palette, title: str, x_label: str) -> None:
    """Open axes: no box, a light horizontal grid, the title where the eye starts."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=colours.ink, pad=10)
    axes.set_xlabel(x_label, color=colours.muted, fontsize=9.5)
    axes.grid(axis="y", color=colours.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colours.muted)
    axes.tick_params(axis="both", colors=colours.muted, labelsize=9.5, length=0, pad=5)
    axes.tick_params(axis="x", length=3.5)
    axes.patch.set_alpha(0.0)


def _log_axis(axes: Axes, values: Sequence[float], ticks: list[float]) -> None:
    axes.set_xscale("log")
    low, high = values[0], values[-1]
    axes.set_xlim((low, high) if low < high else (low / 2, high * 2))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_number))


def _end_labels(axes: Axes, ends: list[tuple[str, float, str]], gap: float) -> None:
    """Names at the right ends of the lines, pushed apart until no two are closer than `gap` (axes fraction)."""
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, y, _ in order:
        wanted = (y - low) / (high - low)
        places.append(max(wanted, places[-1] + gap) if places else wanted)
    excess = max(0.0, places[-1] - 1.0) if places else 0.0
    for index in range(len(places) - 1, -1, -1):
        ceiling = places[index + 1] - gap if index + 1 < len(places) else 1.0
        places[index] = min(places[index], ceiling) if excess else places[index]
    for (name, _, colour), place in zip(order, places, strict=True):
        axes.annotate(
            _short(name),
            (1.0, place),
            xycoords="axes fraction",
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=10,
            fontweight="bold",
        )


def _margins(figure: Figure, names: Sequence[str], left: float = 0.56) -> None:
    """Room in inches, so that the plot keeps its place whatever the font of the page."""
    width, height = figure.get_size_inches()
    longest = max(len(_short(name)) for name in names)
    figure.subplots_adjust(
        left=left / width,
        right=1 - (0.2 + 0.095 * longest) / width,
        top=1 - 0.38 / height,
        bottom=0.52 / height,
    )


def _curves(run: Run, table: dict[str, Curves], metric: str, x: Sequence[float], by_time: bool) -> Drawing:
    def draw(figure: Figure, colours: Palette, narrow: bool) -> None:
        axes = figure.add_subplot()
        title = TITLES[metric] + (" at equal time" if by_time else " at equal samples")
        _frame(axes, colours, title, "seconds per problem" if by_time else "samples per problem, k")
        top, ends = 0.0, []
        for model in run.curves.models:
            place = slot(run, model)
            curve: Curve = table[model].metric(metric)
            mean, low, high = _array(curve.mean), _array(curve.low), _array(curve.high)
            top = max(top, float(np.nanmax(high)))
            colour, base = colours.series[place], place == 0
            axes.fill_between(x, low, high, color=colour, alpha=0.11, linewidth=0)
            for edge in (low, high):
                axes.plot(x, edge, color=colour, linewidth=0.7, alpha=0.45)
            axes.plot(
                x,
                mean,
                color=colour,
                linewidth=2.0,
                linestyle=(0, (4, 2)) if base else LAPS[lap(run, model)],
                marker=MARKERS[place],
                markersize=4.2,
                markevery=max(1, len(x) // 8),
                markeredgecolor=colours.paper,
                markeredgewidth=0.7,
                clip_on=False,
                zorder=3,
            )
            known = mean[~np.isnan(mean)]
            ends.append((model, float(known[-1]) if known.size else 0.0, colour))
        axes.set_ylim(0, min(1.0, 0.1 * np.ceil(top * 10)) or 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        most = 4 if narrow else 7
        ticks = _ticks(x[0], x[-1], (1.0, 2.0, 5.0), most) if by_time else _thin([float(k) for k in x], most)
        _log_axis(axes, x, ticks)
        _end_labels(axes, ends, 0.075)
        _margins(figure, run.curves.models)

    return Drawing(f"{metric}_{'time' if by_time else 'k'}", draw)


def _thin(values: list[float], most: int) -> list[float]:
    step = -(-len(values) // most)
    return values[::-1][::step][::-1]


def _difference(run: Run) -> Drawing:
    students, x = run.curves.students, run.curves.seconds
    pairs = [(model, metric) for metric in METRICS for model in students]

    def panel(axes: Axes, model: str, metric: str, colours: Palette, narrow: bool, limits: tuple[float, float]) -> None:
        curve = run.curves.difference[model].metric(metric)
        colour = colours.series[slot(run, model)]
        _frame(axes, colours, f"{_short(model)} − {_short(run.curves.baseline)}: {TITLES[metric].lower()}, points", "")
        axes.title.set_fontsize(9.5 if narrow else 11)
        for low, high, alpha in ((curve.band_low, curve.band_high, 0.11), (curve.low, curve.high, 0.22)):
            axes.fill_between(x, _array(low), _array(high), color=colour, alpha=alpha, linewidth=0)
        axes.axhline(0, color=colours.ink, linewidth=1.0)
        axes.plot(x, _array(curve.mean), color=colour, linewidth=2.0)
        _log_axis(axes, x, _ticks(x[0], x[-1], (1.0, 2.0, 5.0), 4 if narrow else 6))
        axes.set_ylim(*limits)
        for win in run.curves.wins:
            if (win.model, win.metric) == (model, metric):
                _shade_win(axes, colours, colour, x, (win.from_seconds, win.to_seconds))
        axes.yaxis.set_major_formatter(FuncFormatter(_signed))

    def draw(figure: Figure, colours: Palette, narrow: bool) -> None:
        columns = 1 if narrow else min(2, len(students))
        rows = -(-len(pairs) // columns)
        curves = [run.curves.difference[model].metric(metric) for model, metric in pairs]
        low = min(float(np.nanmin(_array(curve.band_low))) for curve in curves)
        high = max(float(np.nanmax(_array(curve.band_high))) for curve in curves)
        limits = (0.05 * np.floor(low * 20 - 0.3), 0.05 * np.ceil(high * 20 + 0.3))
        for index, (model, metric) in enumerate(pairs):
            axes = figure.add_subplot(rows, columns, index + 1)
            panel(axes, model, metric, colours, narrow, limits)
            if index >= len(pairs) - columns:
                axes.set_xlabel("seconds per problem", color=colours.muted, fontsize=9.5)
        width, height = figure.get_size_inches()
        figure.subplots_adjust(left=0.48 / width, right=1 - 0.12 / width, wspace=0.14, hspace=0.42)
        figure.subplots_adjust(top=1 - 0.36 / height, bottom=0.52 / height)

    wide_rows = -(-len(pairs) // min(2, max(1, len(students))))
    return Drawing("difference", draw, (11.2, 0.6 + 2.7 * wide_rows), (3.7, 0.6 + 2.3 * len(pairs)))


def _shade_win(axes: Axes, colours: Palette, colour: str, x: Sequence[float], span: tuple[float, float]) -> None:
    """A wash over the budgets of a win, with a bar and the word below; a win at one budget reaches half a step."""
    step = (x[-1] / x[0]) ** (0.5 / max(1, len(x) - 1))
    start, stop = max(x[0], span[0] / step), min(x[-1], span[1] * step)
    axes.axvspan(start, stop, color=colour, alpha=0.08, linewidth=0)
    axes.axvspan(start, stop, ymin=0.0, ymax=0.028, color=colour, linewidth=0)
    middle = (start * stop) ** 0.5
    left = middle < (x[0] * x[-1]) ** 0.5
    axes.annotate(
        "ahead",
        (start if left else stop, 0.045),
        xycoords=("data", "axes fraction"),
        xytext=(3 if left else -3, 0),
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom",
        fontsize=9,
        color=colours.ink,
        fontweight="bold",
    )


def _speed(run: Run) -> Drawing:
    batch = common_batch(run)
    models = [m for m in run.curves.models if any(row.model == m and row.batch == batch for row in run.bench)]

    def draw(figure: Figure, colours: Palette, narrow: bool) -> None:
        axes = figure.add_subplot()
        _frame(axes, colours, f"Decoding speed, batch {batch}", "context length, tokens")
        ends, contexts, top = [], set(), 0.0
        for model in models:
            rows = sorted((r.context, r.tokens_per_second) for r in run.bench if r.model == model and r.batch == batch)
            place = slot(run, model)
            axes.plot(
                [context for context, _ in rows],
                [speed for _, speed in rows],
                color=colours.series[place],
                linewidth=2.0,
                linestyle=(0, (4, 2)) if place == 0 else "-",
                marker=MARKERS[place],
                markersize=5,
                markeredgecolor=colours.paper,
                markeredgewidth=0.7,
                clip_on=False,
                zorder=3,
            )
            contexts |= {context for context, _ in rows}
            top = max(top, *(speed for _, speed in rows))
            ends.append((model, rows[-1][1], colours.series[place]))
        grid = [float(context) for context in sorted(contexts)]
        _log_axis(axes, grid, _thin(grid, 6))
        axes.set_ylim(0, top * 1.08)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1000:g}k" if v >= 1000 else f"{v:g}"))
        _end_labels(axes, ends, 0.075)
        _margins(figure, models)

    return Drawing("speed", draw)


def common_batch(run: Run) -> int | None:
    """The largest batch at which every model of the curves was timed, or None."""
    batches = [{row.batch for row in run.bench if row.model == model} for model in run.curves.models]
    shared = set.intersection(*batches) if batches else set()
    return max(shared) if shared else None


def drawings(run: Run) -> list[Drawing]:
    """All figures of a run in the order of the page."""
    curves = run.curves
    found = [_curves(run, curves.by_time, name, curves.seconds, True) for name in curves.metrics(curves.by_time)]
    found += [_difference(run)] if curves.students else []
    if curves.k:
        ks, names = [float(k) for k in curves.k], curves.metrics(curves.by_k)
        found += [_curves(run, curves.by_k, name, ks, False) for name in names]
    return found + ([_speed(run)] if common_batch(run) is not None else [])


def _figure(drawing: Drawing, colours: Palette, narrow: bool) -> Figure:
    figure = Figure(figsize=drawing.narrow if narrow else drawing.wide)
    FigureCanvasAgg(figure)
    figure.patch.set_facecolor(colours.paper)
    drawing.draw(figure, colours, narrow)
    return figure


def _style(name: str) -> AbstractContextManager[None]:
    """Text stays text in SVG; identifiers are a function of `name` and the content."""
    return mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 10})


def write_files(drawing: Drawing, folder: Path) -> None:
    """`<name>.png` at twice the screen's resolution and `<name>.svg`, both on paper colour."""
    with _style(drawing.name):
        figure = _figure(drawing, palette(), narrow=False)
        figure.savefig(folder / f"{drawing.name}.png", dpi=200)
        figure.savefig(folder / f"{drawing.name}.svg", metadata=_NO_METADATA)


_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def inline_svg(drawing: Drawing, narrow: bool) -> str:
    """The figure as an SVG element for the page: colours are CSS variables, text is the page's own, ids are unique."""
    colours, variables = _marked()
    prefix = f"{drawing.name}-{'n' if narrow else 'w'}"
    with _style(prefix):
        figure = _figure(drawing, colours, narrow)
        figure.patch.set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=_NO_METADATA)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'\sid="([^"]+)"', rf' id="{prefix}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'font-family: [^;"]*', "font-family: inherit", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for code, variable in variables.items():
        svg = svg.replace(code, variable)
    box = next(iter(re.findall(r'viewBox="[^"]+"', svg)))
    body = svg[svg.index(">") + 1 :]
    return f'<svg class="{"narrow" if narrow else "wide"}" {box} aria-hidden="true" focusable="false">{body}'


def plot_box(drawing: Drawing, narrow: bool) -> list[float]:
    """[left, right, top, bottom] of a single-axes figure's plot as fractions of its width and height from the top."""
    where = _figure(drawing, palette(), narrow).axes[0].get_position()
    return [round(v, 4) for v in (where.x0, where.x1, 1 - where.y1, 1 - where.y0)]
