"""What distillation cost: students against their teacher on the same held-out problems, level by level.

Retention is the student's figure divided by the teacher's (arXiv 2502.20339 compares these); intervals resample the
problems, the same for all models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfast import records, runtime
from thinkfast.data.problems import Problem
from thinkfast.errors import BadInput
from thinkfast.results import CUT_OFF, Graded, read_source

if TYPE_CHECKING:
    from thinkfast.data.tokenizer import Tokenizer
    from thinkfast.scale.estimate import Floats

FIGURES = ("pass@1", "well_formed", "tokens", "cut_short", "repetition", "loops")
KEPT = ("pass@1", "well_formed")
EVERYTHING = "all"
DECIMALS = 6


def retain(
    models: Sequence[Path],
    samples: Path,
    problems_file: Path,
    texts: int = 200,
    seed: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Compares models, the teacher first, on the samples that stand in a directory of each one's name in `samples`.

    Per level and model: pass@1, the share of completions that end in an answer (`well_formed`), their mean length in
    tokens, the shares that were cut at the limit and that end in a loop, repetition. For students also: the share of
    the teacher's pass@1 and well-formed answers that is left, with a 95 % interval; KL(teacher || student) a token and
    how often both would choose the same token, on up to `texts` completions of the teacher; and the share of problems
    on which both votes give the same answer. Stored in `out` where given. Raises BadInput for models without samples,
    samples of other problems, and students with another vocabulary.
    """
    from thinkfast.data.tokenizer import load_tokenizer

    if len(models) < 2:
        raise BadInput(f"{models[0]}: one model, expected a teacher and its students")
    names = [path.resolve().name for path in models]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise BadInput(f"{', '.join(map(str, models))}: two models are called {twice!r}")
    tokenizer = load_tokenizer(models[0])
    for path in models[1:]:
        if load_tokenizer(path).fingerprint != tokenizer.fingerprint:
            raise BadInput(f"{path}: its tokenizer is not that of {models[0]}")
    graded: dict[str, Graded] = {}
    problems: list[Problem] = []
    for name in names:
        problems, graded[name] = read_source(samples / name, problems_file)
    levels = _levels(problems)
    values = {name: _values(graded[name], problems, tokenizer) for name in names}
    document: dict[str, Any] = {
        "command": runtime.command(),
        "code": runtime.code_version(),
        "teacher": names[0],
        "models": names,
        "problems": {level: len(places) for level, places in levels.items()},
        "levels": {level: {name: _means(values[name], places) for name in names} for level, places in levels.items()},
    }
    teacher = _texts(graded[names[0]], problems, tokenizer, texts)
    voted = {name: votes(graded[name], problems) for name in names}
    for path, name in zip(models[1:], names[1:], strict=True):
        apart = _apart(models[0], path, teacher)
        same = same_votes(voted[names[0]], voted[name], problems)
        for level, places in levels.items():
            row = document["levels"][level][name]
            row["kept"] = {key: _kept(values[names[0]][key], values[name][key], places, seed) for key in KEPT}
            row |= _apart_there(apart, set(places))
            row["same_vote"] = round(sum(same[place] for place in places) / len(places), DECIMALS)
    if out is not None:
        records.write_json(out, document)
    return document


def _levels(problems: Sequence[Problem]) -> dict[str, list[int]]:
    """The places of the problems of every level, of all of them first."""
    known = sorted({problem.level for problem in problems if problem.level is not None})
    levels = {str(level): [i for i, p in enumerate(problems) if p.level == level] for level in known}
    return {EVERYTHING: list(range(len(problems)))} | (levels if len(known) > 1 else {})


def _values(graded: Graded, problems: Sequence[Problem], tokenizer: Tokenizer) -> dict[str, Floats]:
    """Every figure of every problem, (problems,), the mean over its samples; nan without samples."""
    import numpy as np

    from thinkfast.scale.retain import loops, repetition

    place = {problem.id: index for index, problem in enumerate(problems)}
    sums = {key: np.zeros(len(problems)) for key in FIGURES}
    count = np.zeros(len(problems))
    for row, score in zip(graded.samples, graded.scores, strict=True):
        if row.finish_reason == CUT_OFF:
            continue
        at, ids = place[row.problem_id], tokenizer.encode(row.text)
        told = (score.correct, row.finish_reason == "stop" and score.answer is not None, row.token_count)
        for key, value in zip(
            FIGURES, (*told, row.finish_reason == "length", repetition(ids), loops(ids)), strict=True
        ):
            sums[key][at] += value
        count[at] += 1
    return {
        key: np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0) for key, total in sums.items()
    }


def _means(values: Mapping[str, Floats], places: Sequence[int]) -> dict[str, Any]:
    import numpy as np

    found = {key: values[key][places] for key in FIGURES}
    return {key: round(float(np.nanmean(v)), DECIMALS) if np.isfinite(v).any() else None for key, v in found.items()}


def _kept(teacher: Floats, student: Floats, places: Sequence[int], seed: int) -> dict[str, float] | None:
    """The student's mean divided by the teacher's, with its interval; None where the teacher's is nothing."""
    import numpy as np

    from thinkfast.scale.estimate import bootstrap_weights

    pair = np.column_stack([teacher[places], student[places]])
    pair = pair[np.isfinite(pair).all(axis=1)]
    if not len(pair) or not pair[:, 0].any():
        return None
    drawn = bootstrap_weights(len(pair), 2000, seed) @ pair
    ratios = drawn[drawn[:, 0] > 0]
    low, high = np.quantile(ratios[:, 1] / ratios[:, 0], [0.025, 0.975])
    mean = pair[:, 1].mean() / pair[:, 0].mean()
    return {key: round(float(v), DECIMALS) for key, v in (("share", mean), ("low", low), ("high", high))}


def _texts(
    graded: Graded, problems: Sequence[Problem], tokenizer: Tokenizer, limit: int
) -> list[tuple[int, list[int], list[int]]]:
    """(place of the problem, prompt, answer with its end) of up to `limit` completions, spread over the problems."""
    from thinkfast.data.chat import render_prompt

    whole = [row for row in graded.samples if row.finish_reason == "stop"]
    whole.sort(key=lambda row: row.sample_index)
    chosen = whole[:: max(1, len({row.problem_id for row in whole}) // limit)][:limit]
    place = {problem.id: index for index, problem in enumerate(problems)}
    return [
        (
            place[row.problem_id],
            render_prompt(tokenizer, problems[place[row.problem_id]].problem),
            [*tokenizer.encode(row.text), tokenizer.eos_id],
        )
        for row in chosen
    ]


def _apart(teacher: Path, student: Path, texts: Sequence[tuple[int, list[int], list[int]]]) -> list[tuple[int, Any]]:
    from thinkfast.model.checkpoint import load_model
    from thinkfast.scale.retain import divergence

    found = divergence(load_model(teacher), load_model(student), [p for _, p, _ in texts], [a for _, _, a in texts])
    return [(place, one) for (place, _, _), one in zip(texts, found, strict=True)]


def _apart_there(apart: Sequence[tuple[int, Any]], places: set[int]) -> dict[str, Any]:
    mine = [one for place, one in apart if place in places]
    tokens = sum(one.tokens for one in mine)
    if not tokens:
        return {"kl": None, "same_token": None, "texts": 0}
    kl, agreed = sum(one.kl for one in mine) / tokens, sum(one.agreed for one in mine) / tokens
    return {"kl": round(kl, DECIMALS), "same_token": round(agreed, DECIMALS), "texts": len(mine)}


def votes(graded: Graded, problems: Sequence[Problem]) -> list[str | None]:
    """The answer that most samples of each problem give."""
    from thinkfast.scale.aggregate import majority_vote

    rows: dict[str, list[Any]] = {problem.id: [] for problem in problems}
    for row, score in zip(graded.samples, graded.scores, strict=True):
        if row.finish_reason != CUT_OFF:
            rows[row.problem_id].append(score)
    found = []
    for problem in problems:
        mine = rows[problem.id]
        top = majority_vote([one.answer_class if one.answer_class >= 0 else None for one in mine])
        found.append(next((one.answer for one in mine if top is not None and one.answer_class == top), None))
    return found


def same_votes(first: Sequence[str | None], second: Sequence[str | None], problems: Sequence[Problem]) -> list[bool]:
    """Whether two votes on each problem are for equal answers, or both for none."""
    from thinkfast.scale.grade import Grader

    with Grader() as grader:
        return [
            a == b if a is None or b is None else grader.grade(problem.answer, [a, b])[0] == [0, 0]
            for a, b, problem in zip(first, second, problems, strict=True)
        ]


def in_words(document: Mapping[str, Any]) -> list[str]:
    """A table: a row for every level and model."""
    titles = ("level", "model", "pass@1", "well-formed", "tokens", "cut", "repeated", "loops", "KL", "same token",
              "same vote", "pass@1 kept")  # fmt: skip
    show: Mapping[str, Callable[[float], str]] = {"tokens": "{:,.0f}".format, "kl": "{:.4f}".format}
    lines = [titles]
    for level, rows in document["levels"].items():
        for name in document["models"]:
            row = rows[name]
            cells = (*FIGURES, "kl", "same_token", "same_vote")
            told = ["-" if row.get(key) is None else show.get(key, "{:.3f}".format)(row[key]) for key in cells]
            kept = (row.get("kept") or {}).get("pass@1")
            left = f"{kept['share']:.3f} [{kept['low']:.3f}, {kept['high']:.3f}]" if kept else "-"
            lines.append((level, name, *told, left))
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
