import numpy as np
import pytest

from thinkfast.errors import BadInput
from thinkfast.scale.planner import fit_beta, plan_coverage, plan_majority


@pytest.mark.parametrize(("a", "b"), [(0.5, 1.5), (2.0, 2.0), (5.0, 1.0)])
def test_the_fit_finds_the_beta_that_drew_the_counts(a, b):
    dice = np.random.default_rng(0)
    total = np.full(4000, 16)
    found = fit_beta(dice.binomial(16, dice.beta(a, b, 4000)), total)
    assert found == pytest.approx((a, b), rel=0.12)


def test_coverage_foretold_from_four_samples_holds_at_sixty_four():
    inside = 0
    for seed in range(20):
        dice = np.random.default_rng(seed)
        chance = dice.beta(0.7, 1.8, 300)
        right = dice.binomial(4, chance)
        told = plan_coverage(right, np.full(300, 4), [4, 16, 64], seed)
        truth = np.array([np.where(right > 0, 1.0, 1 - (1 - chance) ** (k - 4)).mean() for k in (4, 16, 64)])
        inside += (np.array(told["low"]) <= truth + 1e-9).all() and (truth <= np.array(told["high"]) + 1e-9).all()
        assert np.abs(np.array(told["mean"]) - truth).max() < 0.06
    assert inside >= 15


def test_what_was_seen_is_what_is_foretold_for_as_many():
    right, total = np.array([0, 1, 4, 0]), np.array([4, 4, 4, 4])
    assert plan_coverage(right, total, [4])["mean"] == pytest.approx([0.5])


def test_majority_foretold_from_eight_samples_holds_at_sixty_four():
    dice = np.random.default_rng(2)
    chance = dice.beta(1.0, 1.0, 250)
    wrong = dice.dirichlet([0.6] * 4, 250)

    def votes(k):
        shares = np.concatenate([chance[:, None], wrong * (1 - chance)[:, None]], axis=1)
        return dice.multinomial(k, shares / shares.sum(axis=1, keepdims=True))

    pilot, later = votes(8), votes(64)
    tallies = [np.append(row[row > 0], 0) for row in pilot]
    told = plan_majority(tallies, [0 if row[0] else -1 for row in pilot], [64], draws=60)
    truth = (later[:, 0] > later[:, 1:].max(axis=1)).mean()
    assert told["mean"][0] == pytest.approx(truth, abs=0.05)
    assert told["low"][0] <= truth <= told["high"][0]


def test_problems_without_samples_are_refused():
    with pytest.raises(BadInput, match="without samples"):
        fit_beta(np.array([0, 1]), np.array([0, 2]))
