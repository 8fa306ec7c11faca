import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkfast.errors import BadInput
from thinkfast.scale.aggregate import vote_totals
from thinkfast.scale.estimate import majority_at_k, pass_at_k
from thinkfast.scale.ranked import best_at_k, soft_weights, weighted_at_k, within_auc

ROWS = st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 3)), min_size=1, max_size=7)


def columns(problems):
    """Flat columns of problems, each a list of (class, score); class 0 is right."""
    owner = np.concatenate([np.full(len(rows), i) for i, rows in enumerate(problems)]).astype(np.int64)
    klass = np.array([klass for rows in problems for klass, _ in rows], dtype=np.int64)
    score = np.array([score for rows in problems for _, score in rows], dtype=np.float64)
    return owner, klass, score


def brute_best(rows, k):
    chances = []
    for subset in combinations(rows, k):
        able = [row for row in subset if row[0] >= 0]
        best = max((score for _, score in able), default=None)
        tied = [row for row in able if row[1] == best]
        chances.append(sum(row[0] == 0 for row in tied) / len(tied) if tied else 0.0)
    return np.mean(chances)


def brute_weighted(rows, k):
    chances = []
    for subset in combinations(rows, k):
        totals = vote_totals([c if c >= 0 else None for c, _ in subset], [s for _, s in subset])
        top = max(totals.values(), default=0)
        leaders = [klass for klass, value in totals.items() if value == top and value > 0]
        chances.append((0 in leaders) / len(leaders) if leaders else 0.0)
    return np.mean(chances)


@settings(deadline=None, max_examples=60)
@given(st.lists(ROWS, min_size=1, max_size=3))
def test_best_of_k_is_the_mean_over_all_subsets(problems):
    owner, klass, score = columns(problems)
    ks = list(range(1, min(map(len, problems)) + 1))
    measured = best_at_k(owner, score, klass >= 0, klass == 0, len(problems), ks)
    expected = [[brute_best(rows, k) for k in ks] for rows in problems]
    np.testing.assert_allclose(measured, expected, atol=1e-12)


def test_the_best_reward_of_k_is_the_mean_of_the_highest_over_all_subsets():
    rewards = np.random.default_rng(2).normal(size=7)
    everybody = np.ones(7, dtype=bool)
    found = best_at_k(np.zeros(7, dtype=np.int64), rewards, everybody, rewards, 1, [1, 3, 7])[0]
    wanted = [np.mean([max(part) for part in combinations(rewards, k)]) for k in (1, 3, 7)]
    np.testing.assert_allclose(found, wanted)


def test_weighted_best_of_k_nears_the_mean_over_all_subsets():
    dice = np.random.default_rng(0)
    problems = [[(int(dice.integers(-1, 3)), float(dice.integers(0, 4))) for _ in range(8)] for _ in range(20)]
    owner, klass, score = columns(problems)
    measured = weighted_at_k(owner, score, klass, klass == 0, 20, [1, 3, 8], seed=1, resamples=3000)
    expected = np.array([[brute_weighted(rows, k) for k in (1, 3, 8)] for rows in problems])
    np.testing.assert_allclose(measured, expected, atol=0.045)
    np.testing.assert_allclose(measured[:, 2], expected[:, 2], atol=1e-12)


def test_equal_weights_make_it_the_majority_and_a_perfect_score_makes_it_coverage():
    dice = np.random.default_rng(3)
    klass = dice.integers(-1, 4, 60).astype(np.int64)
    owner = np.zeros(60, dtype=np.int64)
    majority = majority_at_k(klass, 0, [1, 5, 20])
    equal = weighted_at_k(owner, np.ones(60), klass, klass == 0, 1, [1, 5, 20], resamples=4000)[0]
    np.testing.assert_allclose(equal, majority, atol=0.03)
    perfect = best_at_k(owner, (klass == 0).astype(float), klass >= 0, klass == 0, 1, [1, 5, 20])[0]
    right = int((klass == 0).sum())
    np.testing.assert_allclose(perfect, [pass_at_k(60, right, k) for k in (1, 5, 20)], atol=1e-12)


def test_the_order_of_rows_and_unequal_counts_do_not_matter():
    owner, klass, score = columns([[(0, 1), (1, 2), (0, 3)], [(1, 1), (0, 0), (-1, 9), (0, 5), (2, 5)]])
    turn = np.array([5, 0, 7, 2, 4, 1, 3, 6])
    first = best_at_k(owner, score, klass >= 0, klass == 0, 2, [1, 2, 3])
    again = best_at_k(owner[turn], score[turn], (klass >= 0)[turn], (klass == 0)[turn], 2, [1, 2, 3])
    np.testing.assert_allclose(first, again, atol=1e-14)


@settings(deadline=None, max_examples=60)
@given(st.lists(ROWS, min_size=1, max_size=3))
def test_areas_are_shares_of_pairs(problems):
    owner, klass, score = columns(problems)
    overall, within = within_auc(owner, score, klass == 0)

    def share(rows):
        pairs = [(a[1] > b[1]) + 0.5 * (a[1] == b[1]) for a in rows for b in rows if a[0] == 0 and b[0] != 0]
        return np.mean(pairs) if pairs else np.nan

    assert overall == pytest.approx(share([row for rows in problems for row in rows]), nan_ok=True)
    inside = [share(rows) for rows in problems]
    inside = [value for value in inside if not np.isnan(value)]
    assert within == pytest.approx(np.mean(inside) if inside else np.nan, nan_ok=True)


def test_a_score_that_knows_only_the_problem_helps_overall_and_not_within():
    dice = np.random.default_rng(0)
    owner = np.repeat(np.arange(50), 20)
    ease = dice.random(50)
    correct = dice.random(1000) < ease[owner]
    overall, within = within_auc(owner, ease[owner], correct)
    assert overall > 0.7
    assert within == 0.5


def test_soft_weights_are_relative_to_the_best_of_the_problem():
    weights = soft_weights(np.array([0, 0, 1]), np.array([-700.0, -701.0, -1e4]), 2)
    np.testing.assert_allclose(weights, [1, np.exp(-1), 1])


def test_unusable_numbers_are_named():
    owner, klass, score = columns([[(0, 1), (1, 2)]])
    with pytest.raises(BadInput, match="k = 3: expected 1 <= k <= n = 2"):
        best_at_k(owner, score, klass >= 0, klass == 0, 1, [3])
    with pytest.raises(BadInput, match=r"k = \[2, 1\]: expected ascending"):
        best_at_k(owner, score, klass >= 0, klass == 0, 1, [2, 1])
    with pytest.raises(BadInput, match=r"weight -1\.0"):
        weighted_at_k(owner, -score, klass, klass == 0, 1, [1])


@pytest.mark.slow
def test_a_million_samples_in_ten_seconds():
    dice = np.random.default_rng(0)
    owner = np.repeat(np.arange(1000), 1000)
    klass = np.minimum(dice.geometric(0.3, 10**6) - 1, 30)
    score = dice.random(10**6)
    started = time.process_time()
    best_at_k(owner, score, klass >= 0, klass == 0, 1000, [1, 4, 16, 64, 256])
    weighted_at_k(owner, score, klass, klass == 0, 1000, [1, 4, 16, 64, 256])
    assert time.process_time() - started < 10
