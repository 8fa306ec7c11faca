import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from thinkfast.report import figures
from thinkfast.report.load import load_run

NAMES = ["coverage_time", "majority_time", "difference", "coverage_k", "majority_k", "speed"]


def _drawings(demo_run: Path) -> dict[str, figures.Drawing]:
    return {drawing.name: drawing for drawing in figures.drawings(load_run(demo_run, 2))}


def test_files(demo_run: Path, tmp_path: Path) -> None:
    found = _drawings(demo_run)
    assert list(found) == NAMES
    for drawing in found.values():
        figures.write_files(drawing, tmp_path)
        picture = imread(tmp_path / f"{drawing.name}.png")
        assert picture.shape[1] == round(drawing.wide[0] * 200)
        assert picture[::5, ::5, :3].std() > 0.05
        root = ElementTree.parse(tmp_path / f"{drawing.name}.svg").getroot()
        assert root.tag.endswith("svg")


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_inline_svg_takes_its_colours_and_fonts_from_the_page(demo_run: Path, name: str, narrow: bool) -> None:
    svg = figures.inline_svg(_drawings(demo_run)[name], narrow)
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert "var(--series-1)" in svg
    assert "http" not in svg
    assert not re.search(r"(fill|stroke): #", svg)
    assert "DejaVu" not in svg
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(one.startswith(name) for one in ids)
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | {one[1:] for one in re.findall(r'href="([^"]+)"', svg)}
    assert used
    assert used <= set(ids)


def test_the_same_run_draws_the_same_bytes(demo_run: Path, tmp_path: Path) -> None:
    drawing = _drawings(demo_run)["difference"]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        figures.write_files(drawing, tmp_path / folder)
    assert (tmp_path / "a" / "difference.svg").read_bytes() == (tmp_path / "b" / "difference.svg").read_bytes()
    assert figures.inline_svg(drawing, narrow=False) == figures.inline_svg(drawing, narrow=False)


@pytest.mark.parametrize("ends", [[0.5, 0.5, 0.5], [0.99, 1.0, 0.98, 1.0], [0.0, 0.01], [0.2, 0.9]])
def test_labels_at_line_ends_keep_their_distance(ends: list[float]) -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_ylim(0, 1)
    figures._end_labels(axes, [(f"model {i}", y, "black") for i, y in enumerate(ends)], gap=0.08)
    places = sorted(label.xy[1] for label in axes.texts)
    assert min(np.diff(places)) >= 0.08 - 1e-9
    assert max(places) <= 1.0 + 1e-9
    order = [label.get_text() for label in sorted(axes.texts, key=lambda label: label.xy[1])]
    assert order == [f"model {i}" for i in np.argsort(ends, kind="stable")]


def test_plot_box_is_where_the_axes_are(demo_run: Path) -> None:
    drawing = _drawings(demo_run)["coverage_time"]
    left, right, top, bottom = figures.plot_box(drawing, narrow=False)
    svg = figures.inline_svg(drawing, narrow=False)
    width, height = (float(v) for v in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    patch = re.findall(r'patch_1"> <path d="M ([\d.]+) ([\d.]+) L ([\d.]+) [\d.]+ L [\d.]+ ([\d.]+)', svg)[0]
    x0, y_bottom, x1, y_top = (float(v) for v in patch)
    assert [x0 / width, x1 / width] == pytest.approx([left, right], abs=1e-3)
    assert [y_top / height, y_bottom / height] == pytest.approx([top, bottom], abs=1e-3)


def _contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_page_and_figures_share_readable_colours() -> None:
    css = (Path(figures.__file__).parent / "page.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in css.split("@media", 2)[:2])
    colours = figures.palette()
    assert [light[name] for name in ("ink", "muted", "rule", "paper")] == list(figures.PAPER.values())
    assert [light[f"series-{i}"] for i in range(len(colours.series))] == list(colours.series)
    for theme in (light, dark):
        for name in ("ink", "muted", *(f"series-{i}" for i in range(len(colours.series)))):
            assert _contrast(theme[name], theme["paper"]) >= 4.5, name
