import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkfast.errors import BadInput
from thinkfast.scale.grade import Grader
from thinkfast.serve.ballot import Ballot, Chain, find_equal, parse_chain


def chain(index: int, answer: str | None, score: float = 0.5) -> Chain:
    return Chain(index, f"text {index}", answer, 10, 0.1 * index, "stop", score)


def ballot(strategy: str, answers: list[str | None], limit: int = 10, least: int = 1) -> Ballot:
    made = Ballot(strategy, limit, least)
    for index, answer in enumerate(answers):
        made.add(chain(index, answer))
    return made


def test_equal_numbers_vote_together() -> None:
    found = ballot("majority", ["2", "1/2", "0.5", "3", None, "2.0", "0.50"]).outcome(1.5, "deadline")
    assert found.answer == "1/2"
    assert found.confidence == 0.5
    assert [(row["answer"], row["votes"]) for row in found.votes] == [("1/2", 3), ("2", 2), ("3", 1)]
    assert found.samples == 7
    assert found.chain is not None
    assert found.chain.index == 1, "the best scored of the class, the first of equals"


def test_other_answers_wait_for_the_grader() -> None:
    made = ballot("majority", ["\\frac{1}{2}", "x+1", "0.5", "1+x", "x+1"])
    assert made.unplaced == ["\\frac{1}{2}", "x+1", "0.5", "1+x"]
    assert not made.decided(), "two classes may still turn out to be one"
    assert made.totals() == {"\\frac{1}{2}": 1, "x+1": 2, "0.5": 1, "1+x": 1}
    with Grader(seconds=120.0) as grader:
        while made.unplaced:
            answer = made.unplaced[0]
            made.place(answer, find_equal(grader, made.representatives, answer))
    assert made.totals() == {"\\frac{1}{2}": 2, "x+1": 3}


@pytest.mark.parametrize(
    ("strategy", "answers", "limit", "least", "decided"),
    [
        ("majority", ["1"] * 5, 10, 1, False),
        ("majority", ["1"] * 6, 10, 1, True),
        ("majority", ["1"] * 6, 10, 7, False),
        ("majority", ["1"] * 6 + ["2"], 10, 1, True),
        ("majority", ["1"] * 5 + ["2"] * 2, 10, 1, False),
        ("majority", [None] * 10, 10, 1, False),
        ("majority", ["1"] * 4 + ["2", "3", "4", "5", "6"], 10, 1, False),  # it leads for good, without a majority
        ("majority", ["1"] * 6 + ["2", "3", "4", "5"], 11, 1, True),
        ("adaptive", ["1"] * 6, 99, 1, False),
        ("adaptive", ["1"] * 7, 99, 1, True),
        ("adaptive", ["1"] * 7, 99, 8, False),
        ("adaptive", ["1"] * 7 + ["2"], 99, 1, False),
        ("adaptive", [None] * 50, 99, 1, False),
        ("adaptive", ["1"] * 20 + [str(other) for other in range(2, 90)], 256, 1, False),
        ("adaptive", ["1"] * 20 + [str(other) for other in range(2, 20)], 256, 1, True),
        ("weighted", ["1"] * 10, 10, 1, False),
        ("best_of_n", ["1"] * 10, 10, 1, False),
    ],
)
def test_when_a_vote_is_decided(
    strategy: str, answers: list[str | None], limit: int, least: int, decided: bool
) -> None:
    assert ballot(strategy, answers, limit, least).decided() == decided


@settings(deadline=None)
@given(st.lists(st.sampled_from(["1", "2", "3", None]), max_size=14), st.integers(0, 14))
def test_no_majority_that_is_decided_changes(answers: list[str | None], cut: int) -> None:
    early = ballot("majority", answers[:cut], limit=len(answers))
    if early.decided():
        assert early.outcome(0, "").answer == ballot("majority", answers).outcome(0, "").answer


def test_scores_decide_where_they_are_asked_to() -> None:
    rows = [("1", 0.2), ("1", 0.3), ("2", 0.4), ("3", 0.45), (None, 0.99)]
    found = {}
    for strategy in ("majority", "best_of_n", "weighted"):
        made = Ballot(strategy, 10)
        for index, (answer, score) in enumerate(rows):
            made.add(chain(index, answer, score))
        found[strategy] = made.outcome(0, "")
    assert {name: outcome.answer for name, outcome in found.items()} == {
        "majority": "1",
        "best_of_n": "3",
        "weighted": "1",
    }
    assert found["best_of_n"].confidence == 0.25
    assert found["weighted"].confidence == pytest.approx(0.5 / 1.35)


def test_nothing_is_no_answer() -> None:
    found = Ballot("majority", 5).outcome(2.0, "deadline")
    assert (found.answer, found.confidence, found.votes, found.chain) == (None, 0.0, [], None)
    cut = parse_chain(0, "so #### 4", 5, 1.0, "deadline", -1.0)
    assert cut.answer is None, "a chain that was cut off has no answer"
    assert parse_chain(0, "so #### 4", 5, 1.0, "stop", -1.0).score == pytest.approx(math.exp(-0.2))
    assert parse_chain(0, "so #### 4", 5, 1.0, "stop", -1.0).answer == "4"
    made = Ballot("majority", 5)
    made.add(cut)
    assert made.outcome(1.0, "deadline").samples == 0


def test_log_probabilities_vote_as_probabilities() -> None:
    rows = [("1", -700.0), ("1", -701.0), ("2", -700.0), ("2", -699.5), (None, 0.0), ("3", -9e9)]
    for strategy, answer in (("majority", "1"), ("weighted", "2"), ("best_of_n", "2")):
        made = Ballot(strategy, 10, soft=True)
        for index, (said, score) in enumerate(rows):
            made.add(chain(index, said, score))
        found = made.outcome(0, "")
        assert found.answer == answer
    weights = {"1": math.exp(-0.5) + math.exp(-1.5), "2": 1 + math.exp(-0.5), "3": 0.0}
    assert {row["answer"]: row["score"] for row in found.votes} == pytest.approx(weights, abs=1e-6)


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(BadInput, match="strategy is 'luck', expected one of majority, best_of_n, weighted, adaptive"):
        Ballot("luck", 3)
