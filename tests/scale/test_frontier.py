import json

import numpy as np
import pytest

from thinkfast.errors import BadInput
from thinkfast.scale.estimate import bootstrap_weights
from thinkfast.scale.frontier import crossings, dollars, pareto_front, speedups, time_to_reach

SECONDS = np.geomspace(0.01, 1.0, 21)


def drawn(mean, problems=200, seed=0):
    """Values of 0 and 1 whose mean over problems is about `mean` at every point, and that never fall."""
    dice = np.random.default_rng(seed).random(problems)[:, None]
    return (dice < np.asarray(mean)[None, :]).astype(float)


def test_the_front_names_the_leader_and_leaves_out_what_is_no_better_than_before():
    means = {"a": np.array([0.1, 0.3, 0.3, 0.4, 0.4]), "b": np.array([0.0, 0.2, 0.3, 0.5, 0.6])}
    front = pareto_front(means, np.arange(1.0, 6.0))
    assert front == [
        {"model": "a", "from_seconds": 1.0, "to_seconds": 2.0},
        {"model": "b", "from_seconds": 4.0, "to_seconds": 5.0},
    ]


def test_a_crossing_is_where_the_means_cross_and_its_interval_holds_it():
    first, second = np.linspace(0.3, 0.5, 21), np.linspace(0.1, 0.9, 21)
    weights = bootstrap_weights(400, 500, 1)
    (found,) = crossings(drawn(first, 400, 1), drawn(second, 400, 2), SECONDS, weights)
    truth = float(np.interp(0.0, second - first, np.log(SECONDS)))
    assert found["ahead_after"]
    assert found["low"] <= found["seconds"] <= found["high"]
    assert found["low"] <= np.exp(truth) <= found["high"]
    assert found["share"] > 0.95
    (back,) = crossings(drawn(second, 400, 2), drawn(first, 400, 1), SECONDS, weights)
    assert (back["seconds"], back["ahead_after"]) == (found["seconds"], False)
    same = drawn(first)
    assert crossings(same, same, SECONDS, bootstrap_weights(200, 10, 0)) == []


def test_a_model_twice_as_fast_has_a_speed_up_of_two():
    curve = np.minimum(1.0, np.log(SECONDS / 0.005) / 6)
    faster = np.minimum(1.0, np.log(2 * SECONDS / 0.005) / 6)
    rows = speedups(drawn(curve), drawn(faster), SECONDS, bootstrap_weights(200, 200, 0))
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[-1]["speedup"] == pytest.approx(2.0, rel=0.1)
    assert rows[-1]["low"] - 0.05 <= 2.0 <= rows[-1]["high"] + 0.05
    slow = speedups(drawn(curve), drawn(curve / 4), SECONDS, bootstrap_weights(200, 200, 0))
    assert slow[-1]["speedup"] is None


def test_times_are_interpolated_on_the_logarithm():
    mean, seconds = np.array([0.0, 0.5, 0.5, 1.0]), np.array([1.0, 10.0, 100.0, 1000.0])
    assert time_to_reach(mean, seconds, 0.25) == pytest.approx(10**0.5)
    assert time_to_reach(mean, seconds, 0.5) == pytest.approx(10.0)
    assert time_to_reach(mean, seconds, 0.0) == 1.0
    assert time_to_reach(mean, seconds, 1.1) == float("inf")


def test_money_is_time_times_price():
    assert dollars([3.6], 2.0) == pytest.approx([2.0])
    with pytest.raises(BadInput, match="price = 0"):
        dollars([1.0], 0)
