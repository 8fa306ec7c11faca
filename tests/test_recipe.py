import itertools
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkfast.errors import BadInput
from thinkfast.recipe import Recipe, dump_recipe, load_recipe, parse_recipe

TEXT = """
[distill]
lr = 1e-3
tokens = 300_000
[compare.grid]
first = 0.01
last = 0.1
[[student]]
name = "pure"
[[student]]
name = "hybrid"
attention = [1]
distill = { tokens = 5 }
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(TEXT)
    return file


def test_a_students_tables_start_from_the_common_ones(path: Path) -> None:
    pure, hybrid = load_recipe(path).student
    assert (pure.distill.tokens, pure.distill.lr) == (300_000, 1e-3)
    assert (hybrid.distill.tokens, hybrid.distill.lr) == (5, 1e-3)
    assert hybrid.attention == (1,)
    assert pure.align == Recipe.model_fields["align"].default


def test_a_dumped_recipe_reads_back_as_the_same(path: Path) -> None:
    recipe = load_recipe(path, ['problems.path=some \\ "odd" name.jsonl', "sample.slots=[64,128]"])
    assert parse_recipe(tomllib.loads(dump_recipe(recipe)), "dumped") == recipe


@given(st.floats(min_value=1e-9, max_value=1e9), st.text(max_size=20) | st.just("\x7f"))
def test_any_number_and_text_survive_the_dump(lr: float, text: str) -> None:
    raw = {"teacher": {"path": text}, "distill": {"lr": lr}, "student": [{"name": "s"}]}
    recipe = parse_recipe(raw, "raw")
    assert parse_recipe(tomllib.loads(dump_recipe(recipe)), "dumped") == recipe


def test_overrides_win_and_later_ones_last(path: Path) -> None:
    settings = ["distill.lr=2e-5", "distill.lr=3e-5", "student.hybrid.attention=[0, 2]", "student.0.distill.tokens=7"]
    recipe = load_recipe(path, [*settings, "teacher.path=models/mine", "compare.baseline='pure'"])
    assert recipe.distill.lr == recipe.student[0].distill.lr == 3e-5
    assert recipe.student[1].attention == (0, 2)
    assert recipe.student[0].distill.tokens == 7
    assert recipe.teacher.path == "models/mine"
    assert recipe.compare.baseline == "pure"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.lrr=1", "distill.lrr: unknown key, did you mean lr?"),
        ("student.hybrid.distill.los='jsd'", "student.1.distill.los: unknown key, did you mean loss?"),
        ("compare.grid.poins=3", "compare.grid.poins: unknown key, did you mean points?"),
        ("zzz.a=1", "zzz: unknown key, expected teacher, problems, corpus"),
        ("distill.lr='fast'", 'distill.lr: input should be a valid number, not "fast"'),
        ("distill.lr=nan", "distill.lr: input should be a finite number, not NaN"),
        ("sample.n=1.5", "sample.n: input should be a valid integer, not 1.5"),
        ("sample.n=true", "sample.n: input should be a valid integer, not true"),
        ("sample.top_p=1.5", "sample.top_p: input should be less than or equal to 1, not 1.5"),
        (
            "distill.loss='kl'",
            "distill.loss: input should be 'forward_kl', 'reverse_kl', 'jsd', 'skew_kl', 'skew_reverse_kl' "
            "or 'cross_entropy'",
        ),
        ("student.0.name='teacher'", "student name 'teacher' is used twice"),
        ("student.0.name='a/b'", "student.0.name: string should match pattern"),
        ("sft.row_tokens=512", "sft: row_tokens is 512, but no document is cut in this stage: leave it out"),
        ("on_policy.row_tokens=64", "on_policy: row_tokens is 64, but no document is cut in this stage: leave it out"),
        ("compare.baseline='x'", "compare.baseline 'x' is not one of teacher, pure, hybrid"),
        ("compare.grid.last=0.001", "compare.grid: last 0.001 is not above first 0.01"),
        ("student=[]", "student: tuple should have at least 1 item"),
        ("sample.seconds=1", "compare.grid.last 0.1 x 300 problems is 30 s, more than the 1 s of sample.seconds"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(path: Path, override: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_recipe(path, [override])
    told = str(caught.value)
    assert told.startswith(f"{path} (with --set): {message}")
    assert "\n" not in told


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill", "--set distill: expected section.key=value"),
        ("=3", "--set =3: expected section.key=value"),
        ("student.nobody.name='x'", "--set student.nobody.name='x': no 'nobody', expected one of pure, hybrid"),
        ("distill.lr.x=1", "--set distill.lr.x=1: distill.lr is not a section"),
        ("sample.slots=[1", "--set sample.slots=[1: '[1' is not a TOML value"),
    ],
)
def test_an_override_that_does_not_parse_names_itself(path: Path, override: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_recipe(path, [override])
    assert str(caught.value).startswith(message)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(BadInput, match="cannot be read as a recipe"):
        load_recipe(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("a = = 1")
    with pytest.raises(BadInput, match=r"broken\.toml: not valid TOML: .*line 1"):
        load_recipe(broken)
    broken.write_text("[teacher]\npath = 'bundled'\n")
    with pytest.raises(BadInput, match=r"broken\.toml: student: missing"):
        load_recipe(broken)


def test_recipes_are_frozen(path: Path) -> None:
    recipe = load_recipe(path)
    with pytest.raises(ValueError, match="frozen"):
        recipe.sample.n = 3  # type: ignore[misc]


def test_the_grid_is_log_spaced_and_ends_where_it_says(path: Path) -> None:
    grid = load_recipe(path, ["compare.grid.points=5"]).compare.grid.seconds
    assert grid[0] == 0.01
    assert grid[-1] == 0.1
    ratios = [later / earlier for earlier, later in itertools.pairwise(grid)]
    assert ratios == pytest.approx([10**0.25] * 4)
