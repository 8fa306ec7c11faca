import math

import numpy as np
import pytest

from thinkfast.errors import BadInput
from thinkfast.scale.adaptive import allocate, decided, overturn_chance, uniform
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


def test_a_vote_is_decided_by_its_lead_and_not_before_it_has_three():
    assert not decided([2], 0.2)
    assert decided([4], 0.05)
    assert not decided([4, 2], 0.05)
    assert decided([2, 12, 1], 0.05)
    assert not decided([], 0.5)
    with pytest.raises(BadInput, match="error = 0"):
        decided([3], 0)


def test_stopped_votes_are_wrong_about_as_seldom_as_stated():
    dice = np.random.default_rng(1)
    wrong = stopped = 0
    for _ in range(3000):
        chance = dice.random()
        votes = [0, 0]
        for _ in range(200):
            votes[int(dice.random() < chance)] += 1
            if decided(votes, 0.05):
                stopped += 1
                wrong += (votes[1] > votes[0]) != (chance > 0.5)
                break
    assert stopped > 2500
    assert wrong / stopped < 0.10  # looking after every vote makes it more than one look's 0.05


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
