import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from thinkfast.errors import BadInput
from thinkfast.records import read_samples
from thinkfast.report import page, write_report
from thinkfast.report.figures import lap, slot
from thinkfast.report.load import load_run
from thinkfast.report.words import headline

MakeRun = Callable[..., Path]
VOID = {"meta", "link", "input", "br"}
BUDGET_BYTES = 6_000_000


class Strict(HTMLParser):
    """Collects elements; complains of what is closed in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data


def _parse(path: Path) -> Strict:
    parser = Strict()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def _data(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)[0])
    return found


@pytest.fixture(scope="module")
def report(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "made" / "here"
    assert write_report(demo_run, out) == out / "index.html"
    return out / "index.html"


def test_the_page_is_well_formed_and_self_contained(report: Path) -> None:
    parser = _parse(report)
    assert report.stat().st_size < BUDGET_BYTES
    ids = [attrs["id"] for _, attrs in parser.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in parser.found:
        assert "src" not in attrs, tag
        target = attrs.get("href") or attrs.get("xlink:href") or "data:,"
        if target.startswith("#"):
            assert target[1:] in ids
        elif target.startswith("data:"):
            assert target == "data:," or "download" in attrs
        else:
            assert (report.parent / target).is_file()
    text = report.read_text(encoding="utf-8")
    named = text.replace("http://www.w3.org/2000/svg", "")  # the name of a namespace, which nothing fetches
    assert not re.search(r"https?:|@import|fetch\(|XMLHttpRequest|url\((?!#)", named)
    assert "default-src 'none'" in text
    assert [p.name for p in report.parent.iterdir() if p.name.startswith(".")] == []


def test_the_page_tells_the_numbers(report: Path, demo_run: Path) -> None:
    curves = json.loads((demo_run / "curves" / "curves.json").read_text())
    best = max(curves["wins"], key=lambda win: win["low"])
    at = curves["seconds"].index(best["at_seconds"])
    shares = [curves["by_time"][m][best["metric"]]["mean"][at] for m in (best["model"], "teacher")]
    heading = _parse(report).text["h1"].replace("\u00a0", " ")
    assert heading.startswith(f"In {best['at_seconds']:.3g} s per problem the pure Mamba student")
    assert [int(n) for n in re.findall(r"(\d+) %", heading)] == [round(100 * share) for share in shares]
    text = report.read_text(encoding="utf-8")
    for told in ("24\u00a0M", "0.0061", "4.0\u00a0min", "thinkfast demo --out runs/demo", "memory 8 GiB", "132,000"):
        assert told in text


def test_data_of_the_figures_is_the_data_of_the_curves(report: Path, demo_run: Path) -> None:
    curves = json.loads((demo_run / "curves" / "curves.json").read_text())
    plot = _data(report)["plots"]["majority_time"]
    assert plot["x"] == curves["seconds"]
    for series in plot["series"]:
        expected = curves["by_time"][series["model"]]
        assert series["samples"] == pytest.approx(expected["samples"], abs=1e-4)
        assert series["high"] == pytest.approx(expected["majority"]["high"], abs=1e-4)


def test_what_is_plotted_can_be_had_as_csv_and_parquet(report: Path, demo_run: Path) -> None:
    curves = json.loads((demo_run / "curves" / "curves.json").read_text())
    held = {attrs["download"]: attrs["href"] for _, attrs in _parse(report).found if "download" in attrs}
    bytes_of = {name: base64.b64decode(href.partition("base64,")[2]) for name, href in held.items()}
    rows = pyarrow.parquet.read_table(io.BytesIO(bytes_of["curves.parquet"])).to_pylist()
    spelt = list(csv.DictReader(io.StringIO(bytes_of["curves.csv"].decode())))
    assert len(rows) == len(spelt) == 3 * 2 * (len(curves["seconds"]) + len(curves["k"]))
    for row, line in zip(rows, spelt, strict=True):
        assert line["model"] == row["model"]
        assert float(line["mean"]) == row["mean"]
    told = {(r["axis"], r["model"], r["measure"], r["x"]): r for r in rows}
    row = told["seconds", "pure", "majority", curves["seconds"][3]]
    wanted = curves["by_time"]["pure"]
    assert [row[key] for key in ("mean", "low", "high")] == [wanted["majority"][k][3] for k in ("mean", "low", "high")]
    assert row["samples"] == wanted["samples"][3]
    assert told["k", "pure", "majority", 4.0]["samples"] is None


def test_rewards_bring_their_strategies(make_run: MakeRun, add_rewards: Callable[[Path], None], tmp_path: Path) -> None:
    run = make_run()
    assert "Chosen by rewards" not in write_report(run, tmp_path / "without").read_text()
    add_rewards(run)
    curves = json.loads((run / "curves" / "curves.json").read_text())
    win = {"model": "pure", "metric": "weighted", "from_seconds": 0.1, "to_seconds": 0.2}
    curves["wins"].append(win | {"difference": 0.95, "low": 0.9, "high": 1.0})
    (run / "curves" / "curves.json").write_text(json.dumps(curves))
    assert headline(load_run(run, 3)).metric in ("coverage", "majority")
    written = write_report(run, tmp_path / "with")
    assert "Weighted vote</td>" in written.read_text()
    assert "Chosen by rewards" in written.read_text()
    for metric in ("weighted", "best_of_n"):
        assert (tmp_path / "with" / f"{metric}_time.svg").is_file()
        plot = _data(written)["plots"][f"{metric}_time"]
        for series in plot["series"]:
            assert series["mean"] == pytest.approx(curves["by_time"][series["model"]][metric]["mean"], abs=1e-4)
    rows = [row for entry in _data(written)["browser"]["problems"] for part in entry["rows"] for row in part]
    assert {len(row) for row in rows} == {8}
    assert min(row[7] for row in rows if row[2]) > 0 > max(row[7] for row in rows if not row[2])


def test_many_models_keep_apart(make_run: MakeRun, tmp_path: Path) -> None:
    """More models than colours: every one has its line, its name and its place in the data."""
    run = make_run()
    document = json.loads((run / "curves" / "curves.json").read_text())
    more = [f"student-{index}" for index in range(7)]
    for name in more:
        shutil.copytree(run / "samples" / "pure", run / "samples" / name)
        shutil.copy(run / "scores" / "pure.parquet", run / "scores" / f"{name}.parquet")
        for table in ("by_k", "by_time", "difference"):
            document[table][name] = document[table]["pure"]
    document["models"] += more
    (run / "curves" / "curves.json").write_text(json.dumps(document))
    written = write_report(run, tmp_path / "many")
    assert [series["model"] for series in _data(written)["plots"]["coverage_time"]["series"]] == document["models"]
    loaded = load_run(run, 3)
    looks = [(slot(loaded, model), lap(loaded, model)) for model in document["models"]]
    assert len(set(looks)) == 10


def test_chains_survive_whatever_they_contain(report: Path, demo_run: Path) -> None:
    entry = _data(report)["browser"]["problems"][5]
    rows = [row for row in read_samples(demo_run / "samples" / "hybrid") if row.problem_id == entry["id"]]
    rows.sort(key=lambda row: row.t_end)
    assert entry["texts"][2] == [row.text for row in rows]
    assert any("</script>" in text for text in entry["texts"][2])
    assert [row[0] for row in entry["rows"][2]] == pytest.approx([row.t_end / 40 for row in rows], rel=1e-5)
    assert [row[6] for row in entry["rows"][2]] == [row.sample_index for row in rows]


def test_chains_beyond_the_budget_are_left_out_latest_first(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run()
    monkeypatch.setattr(page, "TEXT_CHARACTERS", 20_000)
    monkeypatch.setattr(page, "MAX_ROWS", 500)
    browser = page._browser(load_run(run_dir, 60))
    assert len(browser["problems"]) == 3  # 6 × 152 rows, every second problem
    kept = [texts for entry in browser["problems"] for texts in entry["texts"]]
    total = sum(len(text.encode()) for texts in kept for text in texts)
    assert 20_000 <= total < 21_000
    lengths = [len(texts) for texts in kept]
    assert max(lengths) - min(lengths) <= 1
    assert [len(rows) for rows in browser["problems"][0]["rows"]] == [32, 64, 56]


def _bare(run_dir: Path) -> None:
    """Leaves what a comparison of two foreign models has: one budget, no k, no plan, summary, bench or record."""
    for name in ("summary.json", "bench.json", "models/pure/plan.json", "models/hybrid/plan.json"):
        (run_dir / name).unlink()
    (run_dir / "samples" / "teacher" / "run.json").unlink()
    path = run_dir / "curves" / "curves.json"
    curves = json.loads(path.read_text())
    curves |= {"k": [], "seconds": curves["seconds"][:1], "wins": []}
    for table, keep in (("by_k", 0), ("by_time", 1), ("difference", 1)):
        for by_metric in curves[table].values():
            by_metric.pop("samples", None)
            for curve in by_metric.values():
                for name, values in curve.items():
                    curve[name] = values[:keep]
    path.write_text(json.dumps(curves))


def test_a_bare_run_still_gives_a_page(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir = make_run()
    _bare(run_dir)
    written = write_report(run_dir, tmp_path / "out", shown=2)
    _parse(written)
    assert len(_data(written)["browser"]["problems"]) == 2
    assert sorted(p.stem for p in written.parent.glob("*.svg")) == ["coverage_time", "difference", "majority_time"]


def test_a_teacher_alone_still_gives_a_page(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir = make_run()
    path = run_dir / "curves" / "curves.json"
    curves = json.loads(path.read_text())
    path.write_text(json.dumps(curves | {"models": ["teacher"], "difference": {}, "wins": []}))
    written = write_report(run_dir, tmp_path / "out")
    assert _parse(written).text["h1"].startswith("In 1.6\u00a0s per problem the teacher answers")
    assert not (written.parent / "difference.png").exists()


def test_unusable_places_and_summaries(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir = make_run()
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="file/report: cannot be made a directory"):
        write_report(run_dir, tmp_path / "file" / "report")
    (run_dir / "summary.json").write_text('{"models": {"pure": {"kl": "small"}}}')
    with pytest.raises(BadInput, match=r"summary\.json: models\.pure\.kl: expected a number"):
        write_report(run_dir, tmp_path / "out")


def test_the_report_never_imports_torch() -> None:
    code = "import sys, thinkfast.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
