import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkfast.errors import BadInput
from thinkfast.scale import estimate
from thinkfast.scale.estimate import (
    bootstrap_weights,
    majority_at_k,
    majority_shares,
    pass_at_k,
    percentile_interval,
    simultaneous_band,
)


def naive_share(subset, correct_class):
    votes = [klass for klass in subset if klass >= 0]
    most = max((votes.count(klass) for klass in votes), default=0)
    leaders = {klass for klass in votes if votes.count(klass) == most}
    return Fraction(1, len(leaders)) if correct_class in leaders else Fraction(0)


def naive_majority(classes, correct_class, k):
    subsets = list(combinations(classes, k))
    return float(sum(naive_share(subset, correct_class) for subset in subsets) / len(subsets))


@settings(deadline=None)
@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-14)


def test_pass_at_k_does_not_overflow():
    for n, c, k in ((10_000, 3, 4_000), (10_000, 1, 1), (3_000, 2_999, 1), (5_000, 20, 5_000)):
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-10)


def test_pass_at_k_broadcasts_and_returns_a_number_for_numbers():
    grid = pass_at_k(np.array([[4], [6]]), np.array([[1], [2]]), np.array([1, 2, 4]))
    expected = [[pass_at_k(4, 1, k) for k in (1, 2, 4)], [pass_at_k(6, 2, k) for k in (1, 2, 4)]]
    np.testing.assert_array_equal(grid, expected)
    assert isinstance(pass_at_k(4, 1, 2), float)
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 1, 4) == 1.0


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [(4, 1, 5, "k = 5: expected 1 <= k <= n = 4"), (4, 1, 0, "k = 0"), (4, 5, 1, "c = 5"), (4, -1, 1, "c = -1")],
)
def test_pass_at_k_names_what_is_wrong(n, c, k, message):
    with pytest.raises(BadInput, match=message):
        pass_at_k(n, c, k)
    with pytest.raises(BadInput, match=message):
        pass_at_k(np.array([9, n]), np.array([1, c]), np.array([1, k]))


@settings(deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=9), st.integers(0, 3))
def test_majority_at_k_is_the_mean_over_all_subsets(classes, correct_class):
    sizes = np.arange(1, len(classes) + 1)
    expected = [naive_majority(classes, correct_class, int(k)) for k in sizes]
    np.testing.assert_allclose(majority_at_k(classes, correct_class, sizes), expected, atol=1e-13)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-1, 3), min_size=6, max_size=8), min_size=1, max_size=4))
def test_many_problems_at_once_equal_one_at_a_time(problems):
    counts = np.array([[row.count(klass) for klass in range(-1, 4)] for row in problems])
    shares = majority_shares(counts[:, 1], counts[:, 2:], counts[:, 0], [1, 3, 6])
    single = [[naive_majority(row, 0, k) for k in (1, 3, 6)] for row in problems]
    np.testing.assert_allclose(shares, single, atol=1e-13)


def two_class_share(own, other, k):
    share = sum(
        Fraction(math.comb(own, j) * math.comb(other, k - j)) * (1 if 2 * j > k else Fraction(1, 2))
        for j in range(own + 1)
        if 0 <= k - j <= other and 2 * j >= k
    )
    return float(share / math.comb(own + other, k))


def test_majority_stays_exact_with_many_samples():
    for own, other, ks in ((60, 160, [1, 2, 7, 32, 118, 180]), (440, 560, [1, 2, 8]), (5, 990, [1, 9, 11])):
        shares = majority_shares(np.array([own]), np.array([[other]]), np.array([0]), ks)
        np.testing.assert_allclose(shares[0], [two_class_share(own, other, k) for k in ks], rtol=1e-10)


def test_majority_over_many_tied_classes():
    classes = list(range(40))
    np.testing.assert_allclose(majority_at_k(classes, 3, [1, 20, 40]), [1 / 40] * 3, rtol=1e-12)


def test_subsets_are_drawn_where_exactness_is_too_dear():
    ks = [1, 8, 64, 1500]
    arguments = np.array([700]), np.array([[800, 0]]), np.array([0]), ks
    shares = majority_shares(*arguments, seed=1, resamples=20_000)
    np.testing.assert_allclose(shares[0], [two_class_share(700, 800, k) for k in ks], atol=0.012)
    np.testing.assert_array_equal(shares, majority_shares(*arguments, seed=1, resamples=20_000))
    assert (shares != majority_shares(*arguments, seed=2, resamples=20_000)).any()


@given(
    own=st.integers(0, 60),
    others=st.lists(st.integers(0, 60), max_size=4),
    silent=st.integers(0, 40),
    sizes=st.sets(st.integers(1, 160), min_size=1, max_size=4),
)
def test_what_is_called_sure_is_so_to_its_last_digit(own, others, silent, sizes):
    """With a bound of 1e-4, which these few samples reach, against the exact shares."""
    total = own + sum(others) + silent
    ks = [k for k in sorted(sizes) if k <= total]
    if not ks:
        return
    votes = np.array([others], dtype=np.int64).reshape(1, len(others))
    exact = estimate.majority_shares(np.array([own]), votes, np.array([silent]), ks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "_SURE", 1e-4)
        shares, sure = estimate._sure_shares(np.array([own]), votes, np.array([total]), np.array([ks]))
    assert np.all(np.abs(shares - exact)[sure] <= 1e-4)


def test_large_samples_have_sure_shares_and_exact_ones():
    shares, sure = estimate._sure_shares(
        np.array([700, 100]), np.array([[200], [700]]), np.array([1000] * 2), np.array([[512]])
    )
    assert sure.all()
    assert shares.tolist() == [[1.0], [0.0]]
    exact = estimate.majority_shares(np.array([700, 100]), np.array([[200], [700]]), np.array([100, 200]), [512])
    assert np.allclose(exact, shares, atol=1e-9, rtol=0)


def test_drawn_subsets_split_ties_and_ignore_silent_samples():
    shares = majority_shares(np.array([200]), np.array([[200, 200]]), np.array([900]), [1500, 1], resamples=4_000)
    assert shares[0, 0] == pytest.approx(1 / 3, abs=1e-12)
    assert shares[0, 1] == pytest.approx(200 / 1500, abs=0.02)


def test_a_class_that_nobody_voted_for_wins_nothing():
    assert majority_at_k([-1, -1], 0, 2) == 0.0
    assert majority_at_k([1, -1], 0, 1) == 0.0
    assert majority_at_k([-1, -1], -1, 1) == 0.0
    assert majority_at_k([0, -1, -1], 0, 3) == 1.0


def test_majority_refuses_more_than_there_are():
    with pytest.raises(BadInput, match="k = 3: expected 1 <= k <= n = 2"):
        majority_at_k([0, 1], 0, [1, 3])


def test_weights_are_means_over_drawn_problems():
    weights = bootstrap_weights(7, 500, seed=3)
    counts = weights * 7
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-12)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    np.testing.assert_allclose(counts.var(axis=0), 6 / 7, rtol=0.25)
    np.testing.assert_array_equal(weights, bootstrap_weights(7, 500, seed=3))


def test_interval_agrees_with_resampled_problems():
    rng = np.random.default_rng(0)
    values = rng.random((60, 3)) ** 2
    low, high = percentile_interval(values, bootstrap_weights(60, 6_000, seed=1), 0.9)
    means = np.array([values[rng.integers(0, 60, 60)].mean(axis=0) for _ in range(6_000)])
    np.testing.assert_allclose([low, high], np.quantile(means, [0.05, 0.95], axis=0), atol=0.006)


def test_band_holds_the_whole_curve():
    rng = np.random.default_rng(5)
    held = pointwise = 0
    for seed in range(300):
        paths = np.cumsum(rng.standard_normal((80, 25)), axis=1) + 0.3
        weights = bootstrap_weights(80, 300, seed)
        low, high = simultaneous_band(paths, weights, 0.9)
        held += bool(((low <= 0.3) & (high >= 0.3)).all())
        low, high = percentile_interval(paths, weights, 0.9)
        pointwise += bool(((low <= 0.3) & (high >= 0.3)).all())
    assert 0.84 <= held / 300 <= 0.96
    assert pointwise / 300 < 0.84  # a band of pointwise intervals would promise too much


def test_band_is_not_fooled_by_a_handful_of_problems():
    differences = np.zeros((400, 3))
    differences[:3, 1] = 1.0
    differences[:60, 2] = 1.0
    low, high = simultaneous_band(differences, bootstrap_weights(400, 1000, 0), 0.95)
    assert low[0] == high[0] == 0.0
    assert low[1] < 0 < 3 / 400 < high[1]
    assert low[2] > 0
    same = simultaneous_band(np.ones((50, 1)), bootstrap_weights(50, 100, 0), 0.95)
    assert same[0][0] < 1 < same[1][0]
    assert same[0][0] > 0.9


def test_a_higher_confidence_widens_the_band():
    differences = np.random.default_rng(1).standard_normal((100, 10))
    weights = bootstrap_weights(100, 1000, 0)
    narrow, wide = simultaneous_band(differences, weights, 0.8), simultaneous_band(differences, weights, 0.99)
    assert (wide[0] < narrow[0]).all()
    assert (wide[1] > narrow[1]).all()
