import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkfast.errors import BadInput
from thinkfast.scale.aggregate import best_of_n, majority_vote, vote_totals

ANSWERS = st.lists(st.one_of(st.none(), st.sampled_from("abcd")), max_size=12)
SCORED = st.lists(st.tuples(st.one_of(st.none(), st.sampled_from("abcd")), st.integers(-5, 5)), max_size=12)


@settings(deadline=None)
@given(ANSWERS)
def test_majority_is_the_first_seen_of_the_most_frequent(answers):
    given_answers = [answer for answer in answers if answer is not None]
    most = max((given_answers.count(answer) for answer in given_answers), default=0)
    leaders = [answer for answer in given_answers if given_answers.count(answer) == most]
    assert majority_vote(answers) == (leaders[0] if leaders else None)


def test_none_does_not_win_though_it_is_most_frequent():
    assert majority_vote([None, None, None, 7]) == 7
    assert majority_vote([None, None]) is None
    assert best_of_n([None, "a"], [9.0, -1.0]) == "a"
    assert best_of_n([None, None, "a"], [9.0, 9.0, -1.0], weighted=True) == "a"
    assert best_of_n([None], [1.0]) is None


@settings(deadline=None)
@given(SCORED)
def test_best_of_n_is_the_first_of_the_highest_scores(scored):
    usable = [(answer, score) for answer, score in scored if answer is not None]
    best = max((score for _, score in usable), default=0)
    expected = next((answer for answer, score in usable if score == best), None)
    assert best_of_n([answer for answer, _ in scored], [score for _, score in scored]) == expected


@settings(deadline=None)
@given(SCORED)
def test_weighted_best_of_n_has_the_highest_sum(scored):
    winner = best_of_n([answer for answer, _ in scored], [score for _, score in scored], weighted=True)
    sums = {a: sum(score for b, score in scored if b == a) for a, _ in scored if a is not None}
    expected = next((answer for answer in sums if sums[answer] == max(sums.values())), None)
    assert winner == expected


@settings(deadline=None)
@given(ANSWERS)
def test_equal_scores_make_the_weighted_choice_a_majority_vote(answers):
    assert best_of_n(answers, [0.5] * len(answers), weighted=True) == majority_vote(answers)


def test_weighting_changes_the_choice():
    answers, scores = ["a", "b", "b"], [0.9, 0.5, 0.6]
    assert best_of_n(answers, scores) == "a"
    assert best_of_n(answers, scores, weighted=True) == "b"
    assert vote_totals(answers, scores) == {"a": 0.9, "b": 1.1}


@pytest.mark.parametrize(("scores", "message"), [([1.0], "1 scores for 2 answers"), ([1.0, math.nan], "score nan")])
def test_unusable_scores_are_named(scores, message):
    with pytest.raises(BadInput, match=message):
        best_of_n(["a", "b"], scores)
