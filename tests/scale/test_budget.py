import json
import time
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkfast.errors import BadInput
from thinkfast.scale.budget import Table, curves, reward_curves
from thinkfast.scale.estimate import bootstrap_weights, simultaneous_band


def table(rows):
    """Table of (problem, sample_index, t_end, answer_class, correct) rows."""
    problem, sample, t_end, klass, correct = zip(*rows, strict=True) if rows else ((),) * 5
    return Table(
        np.array(problem, dtype=np.int64),
        np.array(sample, dtype=np.int64),
        np.array(t_end, dtype=np.float64),
        np.array(klass, dtype=np.int64),
        np.array(correct, dtype=bool),
    )


def drawn(seed, problems, samples, rate=1.0, sharpness=1.0):
    """A model whose samples end in rounds at `rate` a second; problems differ in how often it is right."""
    rng = np.random.default_rng([7, seed])
    chance = np.random.default_rng(99).beta(1, 2, problems) ** (1 / sharpness)
    problem = np.tile(np.arange(problems), samples)
    t_end = np.cumsum(rng.exponential(1 / rate, problems * samples))
    correct = rng.random(problems * samples) < chance[problem]
    klass = np.where(correct, 0, rng.integers(-1, 5, problems * samples))
    klass = np.where(~correct & (klass == 0), 1, klass)
    return Table(problem, np.repeat(np.arange(samples), problems), t_end, klass, correct)


def naive_vote(rows):
    votes = [klass for _, _, _, klass, _ in rows if klass >= 0]
    most = max((votes.count(klass) for klass in votes), default=0)
    leaders = {klass for klass in votes if votes.count(klass) == most}
    right = {klass for _, _, _, klass, correct in rows if correct}
    return len(leaders & right) / len(leaders) if leaders else 0.0


def naive_by_time(rows, problems, tau):
    counted = [[row for row in rows if row[0] == p and row[2] <= tau * problems] for p in range(problems)]
    coverage = np.mean([any(row[4] for row in one) for one in counted])
    majority = np.mean([naive_vote(one) for one in counted])
    return coverage, majority, sum(map(len, counted)) / problems


@st.composite
def samples(draw):
    """(problems, rows): up to 3 problems whose classes 0 and 3 are right; equal times occur."""
    problems = draw(st.integers(1, 3))
    rows = []
    for p in range(problems):
        for j, (klass, t_end) in enumerate(
            draw(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 9)), max_size=5))
        ):
            rows.append((p, j, float(t_end), klass, klass in (0, 3)))
    return problems, draw(st.permutations(rows))


@settings(deadline=None, max_examples=60)
@given(samples())
def test_curves_by_time_count_what_has_ended(drawn_rows):
    problems, rows = drawn_rows
    grid = [0.3, 1.0, 2.0, 2.5, 4.0, 10.0]
    curve = curves({"m": table(rows)}, problems, "m", grid, [], seed=0, replicates=5)["by_time"]["m"]
    expected = [naive_by_time(rows, problems, tau) for tau in grid]
    measured = zip(curve["coverage"]["mean"], curve["majority"]["mean"], curve["samples"], strict=True)
    np.testing.assert_allclose(list(measured), expected, atol=1e-14)


@settings(deadline=None, max_examples=60)
@given(samples())
def test_curves_by_k_average_over_all_subsets(drawn_rows):
    problems, rows = drawn_rows
    document = curves({"m": table(rows)}, problems, "m", [1.0], [1, 2, 3, 4], seed=0, replicates=5)
    by_problem = [[row for row in rows if row[0] == p] for p in range(problems)]
    assert document["k"] == [k for k in (1, 2, 3, 4) if k <= min(map(len, by_problem))]
    for position, k in enumerate(document["k"]):
        subsets = [list(combinations(one, k)) for one in by_problem]
        coverage = np.mean([np.mean([any(row[4] for row in s) for s in one]) for one in subsets])
        majority = np.mean([np.mean([naive_vote(s) for s in one]) for one in subsets])
        assert document["by_k"]["m"]["coverage"]["mean"][position] == pytest.approx(coverage, abs=1e-13)
        assert document["by_k"]["m"]["majority"]["mean"][position] == pytest.approx(majority, abs=1e-13)


def test_a_small_case_by_hand():
    rows = [(0, 0, 1.0, 1, False), (0, 1, 2.0, 0, True), (1, 0, 4.0, 0, True), (1, 1, 5.0, -1, False)]
    other = [(0, 0, 8.0, 0, True), (1, 0, 8.0, 1, False)]
    document = curves(
        {"fast": table(rows), "slow": table(other)}, 2, "slow", [0.4, 0.5, 1.0, 2.0, 4.0], [1, 2], 0, replicates=10
    )
    fast = document["by_time"]["fast"]
    assert fast["coverage"]["mean"] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert fast["majority"]["mean"] == [0.0, 0.0, 0.25, 0.75, 0.75]
    assert fast["samples"] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert document["difference"]["fast"]["coverage"]["mean"] == [0.0, 0.0, 0.5, 1.0, 0.5]
    assert document["k"] == [1]
    assert document["by_k"]["fast"]["majority"]["mean"] == [0.5]


def test_document_has_the_agreed_shape():
    models = {"teacher": drawn(0, 30, 4), "pure": drawn(1, 30, 4), "hybrid": drawn(2, 30, 4)}
    document = curves(models, 30, "teacher", [0.5, 1.0, 2.0], [1, 2, 4, 8], seed=0, replicates=50)
    assert json.loads(json.dumps(document)) == document
    assert list(document) == [
        *("baseline", "models", "problems", "confidence", "replicates", "k", "seconds"),
        *("by_k", "by_time", "difference", "wins"),
    ]
    assert document["k"] == [1, 2, 4]
    assert list(document["difference"]) == ["pure", "hybrid"]
    for metric in ("coverage", "majority"):
        assert set(document["by_time"]["pure"]) == {"coverage", "majority", "samples"}
        for part, size in (("by_k", 3), ("by_time", 3), ("difference", 3)):
            assert all(len(column) == size for column in document[part]["pure"][metric].values())
        for curve in (document["by_time"]["pure"][metric], document["by_k"]["pure"][metric]):
            assert (np.array(curve["low"]) <= curve["mean"]).all()
            assert (np.array(curve["mean"]) <= curve["high"]).all()
    assert document == curves(models, 30, "teacher", [0.5, 1.0, 2.0], [1, 2, 4, 8], seed=0, replicates=50)


def test_differences_are_paired():
    """Resampling each model by itself would give the difference of two equal models a spread."""
    model = drawn(0, 40, 6)
    document = curves({"a": model, "b": model}, 40, "a", [1.0, 3.0], [1], seed=0, replicates=100)
    for metric in ("coverage", "majority"):
        assert all(column == [0.0, 0.0] for column in document["difference"]["b"][metric].values())
    assert document["wins"] == []


def test_wins_are_the_runs_above_zero():
    models = {"slow": drawn(1, 150, 8), "fast": drawn(2, 150, 8, rate=3.0)}
    grid = np.geomspace(0.02, 8.0, 40)
    document = curves(models, 150, "slow", grid, [1], seed=0, replicates=400)
    assert {win["metric"] for win in document["wins"]} == {"coverage", "majority"}
    for metric in ("coverage", "majority"):
        curve = document["difference"]["fast"][metric]
        claimed = np.zeros(len(grid), dtype=bool)
        for win in (win for win in document["wins"] if win["metric"] == metric):
            inside = (grid >= win["from_seconds"]) & (grid <= win["to_seconds"])
            assert not (claimed & inside).any()
            claimed |= inside
            at = list(grid).index(win["at_seconds"])
            assert inside[at]
            assert win["low"] == curve["band_low"][at] == np.array(curve["band_low"])[inside].max() > 0
            assert win["difference"] == curve["mean"][at]
            assert win["high"] == curve["band_high"][at]
        np.testing.assert_array_equal(claimed, np.array(curve["band_low"]) > 0)
    assert curves(models, 150, "fast", grid, [1], seed=0, replicates=400)["wins"] == []


@pytest.mark.parametrize(("in_rounds", "limit"), [(False, 0.06), (True, 0.10)])
def test_two_equal_models_seldom_win(in_rounds, limit):
    """Drawn in rounds, the noise of the clock itself, which all problems share, comes on top."""
    grid, false = np.geomspace(0.02, 8.0, 25), 0
    for seed in range(200):
        models = {"a": drawn(2 * seed, 60, 8), "b": drawn(2 * seed + 1, 60, 8)}
        if not in_rounds:
            clock = np.random.default_rng(seed)
            models = {name: replace(model, t_end=clock.uniform(0, 480, 480)) for name, model in models.items()}
        false += bool(curves(models, 60, "a", grid, [], seed, replicates=200)["wins"])
    assert false / 200 <= limit


def test_band_covers_a_true_difference():
    """Against the difference of the population that the problems are drawn from, over the whole clock."""
    rng = np.random.default_rng(0)
    rounds = np.arange(1, 21)

    def covered(problems):
        chance = rng.beta(1, 3, problems)[:, None]
        first = rng.geometric(np.clip(chance, 1e-9, 1)), rng.geometric(np.clip(chance * 0.7, 1e-9, 1))
        return (first[0] <= rounds).astype(float) - (first[1] <= rounds).astype(float)

    truth = covered(400_000).mean(axis=0)
    held = 0
    for seed in range(200):
        low, high = simultaneous_band(covered(120), bootstrap_weights(120, 300, seed), 0.95)
        held += bool(((low <= truth) & (truth <= high)).all())
    assert held / 200 >= 0.90


GOOD = [(0, 0, 1.0, 0, True), (1, 0, 2.0, 1, False), (1, 1, 3.0, 1, False)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*GOOD, (2, 0, 1.0, 0, True)], "m: problem = 2: expected 0 .. 1"),
        ([*GOOD, (-1, 0, 1.0, 0, True)], "m: problem = -1"),
        ([*GOOD, (1, 1, 9.0, 0, True)], "m: sample_index = 1 of problem 1 occurs twice"),
        ([*GOOD, (0, 1, float("nan"), 0, True)], "m: t_end = nan"),
        ([*GOOD, (0, 1, -1.0, 0, True)], "m: t_end = -1.0"),
        ([*GOOD, (0, 1, 1.0, -1, True)], "m: answer_class = -1: expected >= 0, or -1 for a wrong answer"),
        ([*GOOD, (0, 1, 1.0, -2, False)], "m: answer_class = -2"),
        ([*GOOD, (1, 2, 1.0, 1, True)], "m: answer_class = 1 of problem 1 is right and wrong"),
    ],
)
def test_unusable_tables_are_named(rows, message):
    with pytest.raises(BadInput, match=message):
        curves({"m": table(rows)}, 2, "m", [1.0], [1], seed=0, replicates=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "x"}, "baseline = 'x': expected one of m"),
        ({"seconds": [1.0, 1.0]}, "seconds = "),
        ({"seconds": [0.0, 1.0]}, "seconds = "),
        ({"seconds": []}, "seconds = "),
        ({"ks": [2, 1]}, "k = "),
        ({"ks": [0, 1]}, "k = "),
        ({"confidence": 1.0}, "confidence = 1.0"),
        ({"problems": 0}, "problems = 0"),
    ],
)
def test_unusable_arguments_are_named(change, message):
    arguments = {"problems": 2, "baseline": "m", "seconds": [1.0], "ks": [1], "seed": 0, "replicates": 5} | change
    with pytest.raises(BadInput, match=message):
        curves({"m": table(GOOD)}, **arguments)


def test_columns_of_unequal_length_are_named():
    short = replace(table(GOOD), t_end=np.zeros(2))
    with pytest.raises(BadInput, match=r"m: columns of equal length expected, not .*t_end \(2,\)"):
        curves({"m": short}, 2, "m", [1.0], [1], seed=0, replicates=5)


def test_a_model_without_samples_scores_nothing():
    document = curves({"m": table(GOOD), "none": table([])}, 2, "none", [1.0, 2.0], [1], seed=0, replicates=20)
    assert document["k"] == []
    assert document["by_time"]["none"]["coverage"]["mean"] == [0.0, 0.0]
    assert document["difference"]["m"]["coverage"]["mean"] == document["by_time"]["m"]["coverage"]["mean"] == [0.5, 0.5]


@pytest.mark.slow
def test_a_million_rows_take_seconds():
    models = {name: drawn(seed, 1000, 500) for seed, name in enumerate("ab")}
    started = time.process_time()
    curves(models, 1000, "a", np.geomspace(0.1, 500.0, 50), [1, 4, 16, 64, 256], seed=0)
    assert time.process_time() - started < 20


def test_reward_curves_are_the_best_so_far_and_need_no_verdict():
    """Three samples of two prompts, by hand: 1 s apart, the second prompt's first sample comes last."""
    owner, index = np.array([0, 0, 1]), np.array([0, 1, 0])
    score = np.array([1.0, 4.0, 2.0])
    one = Table(owner, index, np.array([1.0, 2.0, 3.0]), np.full(3, -1), np.zeros(3, bool), np.ones(3), score)
    better = replace(one, score=score + 1)
    found = reward_curves({"a": one, "b": better}, 2, "a", [0.25, 0.5, 1.0, 2.0], [1, 2], 0, 50)
    # Before a prompt has a sample it counts with the lowest score of all, 1.
    assert found["by_time"]["a"]["reward"]["mean"] == [1.0, 1.0, 2.5, 3.0]
    assert found["by_time"]["b"]["reward"]["mean"] == [1.0, 1.5, 3.0, 4.0]
    assert found["k"] == [1]
    assert found["by_k"]["a"]["reward"]["mean"] == [pytest.approx((2.5 + 2.0) / 2)]
    assert found["difference"]["b"]["reward"]["mean"] == [0.0, 0.5, 0.5, 1.0]
    with pytest.raises(BadInput, match="scores of a: expected all of a, b"):
        reward_curves({"a": one, "b": replace(one, score=None)}, 2, "a", [1.0], [1], 0)
