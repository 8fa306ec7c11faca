"""The generator: worked solutions are right, splits are disjoint, a seed fixes everything."""

from __future__ import annotations

import re

import pytest

from thinkfast.data import wordproblems
from thinkfast.errors import BadInput

SENTENCES: list[tuple[str, str]] = [
    (r"(\w+) has (\d+) (more|fewer) than (\w+)", "compare"),
    (r"(\w+) has (\d+) times as many as (\w+)", "times"),
    (r"(\w+) has (half|a third|a quarter|a fifth) as many as (\w+)", "part"),
    (r"(\w+) has as many as (\w+) and (\w+) together", "together"),
    (r"Every (\w+) (\w+) (finds|gets|sells|loses) (\d+)", "every day"),
    (r"This goes on for (\d+) days", "days"),
    (r"(\w+) has (\d+) \w+", "start"),
    (r"How many \w+ do (\w+) and (\w+) have in total", "total"),
    (r"How many more \w+ does (\w+) have than (\w+)", "difference"),
    (r"Each of the \w+ costs (\d+) dollars", "price"),
    (r"How many dollars are those of (\w+) worth", "cost"),
]
DIVISORS = {"half": 2, "a third": 3, "a quarter": 4, "a fifth": 5}


def solve(problem: str) -> int:
    """An independent reader of the problem's sentences: what the question asks for."""
    held: dict[str, int] = {}
    rules: list[tuple[str, int]] = []
    price = 0
    for sentence in re.split(r"[.?]\s*", problem):
        found = [(kind, match) for pattern, kind in SENTENCES if (match := re.fullmatch(pattern, sentence))]
        if not found:
            assert not sentence, sentence
            continue
        kind, parts = found[0][0], found[0][1].groups()
        if kind == "start":
            held[parts[0]] = int(parts[1])
        elif kind == "compare":
            held[parts[0]] = held[parts[3]] + int(parts[1]) * (1 if parts[2] == "more" else -1)
        elif kind == "times":
            held[parts[0]] = held[parts[2]] * int(parts[1])
        elif kind == "part":
            assert held[parts[2]] % DIVISORS[parts[1]] == 0
            held[parts[0]] = held[parts[2]] // DIVISORS[parts[1]]
        elif kind == "together":
            held[parts[0]] = held[parts[1]] + held[parts[2]]
        elif kind == "every day":
            rules.append((parts[1], int(parts[3]) * (1 if parts[2] in ("finds", "gets") else -1)))
        elif kind == "days":
            for who, by in rules:
                held[who] += by * int(parts[0])
        elif kind == "price":
            price = int(parts[0])
        elif kind == "total":
            return held[parts[0]] + held[parts[1]]
        elif kind == "difference":
            return held[parts[0]] - held[parts[1]]
        else:
            return held[parts[0]] * price
    raise AssertionError(f"no question in {problem!r}")


@pytest.fixture(scope="module")
def problems() -> list[wordproblems.WordProblem]:
    return wordproblems.generate(5, 400, "train", list(wordproblems.LEVELS))


def test_answers_agree_with_an_independent_solver(problems: list[wordproblems.WordProblem]) -> None:
    for problem in problems:
        assert int(problem.answer) == solve(problem.problem), problem.problem
        assert problem.solution.endswith(f"\n#### {problem.answer}")


def test_level_counts_the_calculations_before_the_question(problems: list[wordproblems.WordProblem]) -> None:
    for problem in problems:
        assert problem.solution.count("Notes:") == problem.level + 1
    assert {problem.level for problem in problems} == set(wordproblems.LEVELS)


def test_a_seed_fixes_the_set_and_another_changes_it() -> None:
    again = wordproblems.generate(7, 20, "train", [2, 3])
    assert again == wordproblems.generate(7, 20, "train", [2, 3])
    assert again != wordproblems.generate(8, 20, "train", [2, 3])
    assert again[:5] == wordproblems.generate(7, 5, "train", [2, 3])


def test_splits_are_disjoint_by_problem_text() -> None:
    train = {p.problem for seed in range(3) for p in wordproblems.generate(seed, 500, "train", [1])}
    held_out = {p.problem for seed in range(3) for p in wordproblems.generate(seed, 200, "held-out", [1])}
    assert len(held_out) > 200
    assert not train & held_out
    assert all(wordproblems.is_held_out(p.id) for p in wordproblems.generate(1, 20, "held-out", [4]))


def test_problems_of_a_set_are_different() -> None:
    found = wordproblems.generate(1, 1500, "train", [1])
    assert len({problem.id for problem in found}) == len({problem.problem for problem in found}) == 1500


@pytest.mark.parametrize(
    ("count", "split", "levels", "message"),
    [
        (0, "train", [1], "count 0"),
        (1, "test", [1], "split 'test'"),
        (1, "train", [], r"levels \[\]"),
        (1, "train", [3, 17], r"levels \[3, 17\]"),
    ],
)
def test_bad_requests_name_the_value(count: int, split: str, levels: list[int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        wordproblems.generate(1, count, split, levels)
