import math

import numpy as np
import pytest

from thinkfast.errors import BadInput
from thinkfast.scale.adaptive import LiveVotes, allocate, decided, evidence, overturn_chance, uniform
from thinkfast.scale.budget import Table


def test_the_chance_is_the_beta_tail():
    dice = np.random.default_rng(0)
    for first, second in ((0, 0), (3, 0), (5, 2), (9, 8)):
        drawn = dice.beta(first + 1, second + 1, 200_000)
        assert overturn_chance(first, second) == pytest.approx((drawn < 0.5).mean(), abs=0.005)
    # P(p < 1/2), p ~ Beta(5, 2), by integrating its density 30 p^4 (1 - p).
    assert overturn_chance(4, 1) == pytest.approx(30 * (0.5**5 / 5 - 0.5**6 / 6))
    for first in range(30):
        for second in range(30):
            assert overturn_chance(first, second) + overturn_chance(second, first) == pytest.approx(1.0)
    assert overturn_chance(4000, 3000) < 1e-20
    assert not math.isnan(overturn_chance(4000, 3999))


def test_evidence_is_the_integral_over_better_coins():
    grid = np.linspace(0.5, 1, 200_001)
    for first, second in ((0, 0), (3, 0), (5, 2), (9, 12)):
        wanted = 2 ** (first + second + 1) * np.trapezoid(grid**first * (1 - grid) ** second, grid)
        assert evidence(first, second) == pytest.approx(wanted, rel=1e-6)
    assert math.isfinite(evidence(5000, 10))


def test_a_vote_is_decided_by_its_lead():
    assert not decided([6], 0.05)
    assert decided([7], 0.05)
    assert not decided([7, 1], 0.05)
    assert decided([2, 20], 0.05)
    assert decided([5], 0.1)
    assert not decided([5, 0, 0], 0.1)  # two rivals share the error
    assert not decided([], 0.5)
    with pytest.raises(BadInput, match="error = 0"):
        decided([3], 0)


@pytest.mark.parametrize("error", [0.05, 0.2])
def test_an_undecidable_vote_is_stopped_no_more_often_than_stated(error):
    """The worst case: both answers come equally often, and one looks after every vote."""
    dice = np.random.default_rng(1)
    runs, stopped = 1500, 0
    for _ in range(runs):
        heads = dice.random(200) < 0.5
        for votes in np.column_stack([heads.cumsum(), (~heads).cumsum()]):
            if decided(votes.tolist(), error):
                stopped += 1
                break
    # Either may come to lead: each with at most `error`.
    assert error / 4 < stopped / runs / 2 <= error


def test_live_votes_tell_which_problems_are_over():
    votes = LiveVotes(2, 0.1)
    for text in ("#### 4", "nothing", "the answer is 4.0", r"\boxed{8/2}", "#### 4"):
        votes.count(0, text)
        votes.count(1, "#### 4")
    assert votes.over == {1}
    votes.count(0, "#### 4")
    assert votes.over == {0, 1}


def table(problems, samples, seconds=1.0, seed=0):
    dice = np.random.default_rng(seed)
    chance = dice.beta(0.6, 0.6, problems)
    owner = np.tile(np.arange(problems), samples)
    klass = np.where(dice.random(len(owner)) < chance[owner], 0, dice.integers(1, 4, len(owner)))
    index = np.repeat(np.arange(samples), problems)
    took = np.full(len(owner), seconds)
    return Table(owner, index, np.cumsum(took), klass, klass == 0, took)


def test_uniform_replay_is_the_run_itself_when_one_sample_runs_at_a_time():
    from thinkfast.scale.budget import values_by_time

    one = table(20, 6)
    seconds = np.linspace(0.5, 6.0, 12)
    np.testing.assert_allclose(uniform(one, 20, seconds, 1), values_by_time(one, 20, seconds)["majority"])


def test_stopping_decided_votes_gains_where_problems_differ():
    one = table(300, 60)
    seconds = np.linspace(0.1, 3, 20)
    spent, even = allocate(one, 300, seconds, 0.05, 16), uniform(one, 300, seconds, 16)
    assert spent.shape == even.shape == (300, 20)
    assert spent.mean() > even.mean()
    # Nothing is decided after one or two votes.
    np.testing.assert_allclose(spent[:, :1], even[:, :1])


def test_samples_without_times_cannot_be_replayed():
    one = table(2, 2)
    with pytest.raises(BadInput, match="a replay needs the seconds"):
        uniform(Table(one.problem, one.sample_index, one.t_end, one.answer_class, one.correct), 2, np.ones(1), 1)
