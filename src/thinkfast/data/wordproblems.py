"""A seeded generator of school word problems with worked chains of thought.

A problem tells how many things two or three people have, each amount given through earlier ones, then what they find
and lose every day for some days, and asks for one number. People come in a fixed order of names and a day's hours in
theirs, so that what comes next is never in doubt. A problem's level is the number of calculations before the question
is asked. The solution walks through the facts and the days in order, calculates digit by digit, and after every
calculation notes all that it still needs: the amounts, what happens every day, the day, what is asked. So nothing has
to be recalled from far back, and a chain of thought is as long as the days are many.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from thinkfast.data import longhand
from thinkfast.errors import BadInput

LEVELS = range(1, 17)
LARGEST = 999
NAMES = (
    "Ava",
    "Ben",
    "Cora",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ivy",
    "Jon",
    "Kim",
    "Leo",
)
HOURS = (("morning", "finds", 1), ("noon", "sells", -1), ("evening", "gets", 1), ("night", "loses", -1))
"""When something happens every day, its verb, and whether it adds or takes away."""
MOST_DAYS = 9
ASKED = "{asked}"
"""Where the notes say what is asked: the question is drawn last, from the amounts of the end."""
ITEMS = ("apples", "books", "cards", "coins", "eggs", "marbles", "nuts", "pears", "pens")
PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}
HELD_OUT_SHARE = 10
"""One question in this many belongs to the held-out split, by a hash of its text."""


@dataclass(frozen=True, slots=True)
class WordProblem:
    """One problem with its worked solution; `answer` is the integer as text, `level` the number of calculations."""

    id: str
    problem: str
    solution: str
    answer: str
    level: int


@dataclass(frozen=True, slots=True)
class _Rule:
    """What happens every day at one hour."""

    hour: str
    who: str
    verb: str
    sign: int
    by: int


class _Impossible(Exception):
    """The drawn step has no numbers that fit; the caller draws another."""


@dataclass(slots=True)
class _Story:
    """A problem in the making: the amounts so far, the sentences told and the lines of the solution."""

    rng: random.Random
    item: str
    people: list[str]
    amounts: dict[str, int]
    facts: list[str]
    lines: list[str]
    rules: list[_Rule]
    days: int
    day: int = 0

    def pick(self) -> str:
        return self.rng.choice(list(self.amounts))

    def next_person(self) -> str:
        return self.people[len(self.amounts)]

    def note(self, who: str, amount: int) -> None:
        self.amounts[who] = amount
        noted = [f"{name} {held}" for name, held in self.amounts.items()]
        noted += [f"{rule.hour} {rule.who} {rule.verb} {rule.by}" for rule in self.rules]
        noted += [f"day {self.day} of {self.days}"] if self.days else []
        self.lines.append(f"Notes: {', '.join(noted)}, asked {ASKED}.")


def _compare(story: _Story) -> None:
    """Ben has 18 more or fewer than Ava."""
    base, who = story.pick(), story.next_person()
    have = story.amounts[base]
    by = story.rng.randint(3, 99)
    if story.rng.random() < 0.5:
        word, line, amount = "more", longhand.add(have, by), have + by
    else:
        if by > have - 2:
            raise _Impossible
        word, line, amount = "fewer", longhand.subtract(have, by), have - by
    _fits(amount)
    story.facts.append(f"{who} has {by} {word} than {base}.")
    story.lines.append(f"{who} has {by} {word} than {base}. {base} {have}. {line} So {who} {amount}.")
    story.note(who, amount)


def _times(story: _Story) -> None:
    """Ben has 3 times as many as Ava."""
    base, who = story.pick(), story.next_person()
    have, factor = story.amounts[base], story.rng.randint(2, 6)
    amount = _fits(have * factor)
    story.facts.append(f"{who} has {factor} times as many as {base}.")
    line = longhand.multiply(have, factor)
    story.lines.append(f"{who} has {factor} times as many as {base}. {base} {have}. {line} So {who} {amount}.")
    story.note(who, amount)


def _part(story: _Story) -> None:
    """Ben has a third as many as Ava."""
    divisor = story.rng.choice(list(PARTS))
    fitting = [name for name, amount in story.amounts.items() if amount % divisor == 0 and amount // divisor > 1]
    if not fitting:
        raise _Impossible
    base, who = story.rng.choice(fitting), story.next_person()
    have = story.amounts[base]
    amount = have // divisor
    story.facts.append(f"{who} has {PARTS[divisor]} as many as {base}.")
    line = longhand.divide(have, divisor)
    story.lines.append(f"{who} has {PARTS[divisor]} as many as {base}. {base} {have}. {line} So {who} {amount}.")
    story.note(who, amount)


def _together(story: _Story) -> None:
    """Cora has as many as Ava and Ben together."""
    if len(story.amounts) < 2:
        raise _Impossible
    first, second = story.rng.sample(list(story.amounts), 2)
    who, a, b = story.next_person(), story.amounts[first], story.amounts[second]
    amount = _fits(a + b)
    story.facts.append(f"{who} has as many as {first} and {second} together.")
    story.lines.append(
        f"{who} has as many as {first} and {second} together. {first} {a}. {second} {b}. "
        f"{longhand.add(a, b)} So {who} {amount}."
    )
    story.note(who, amount)


def _make_rules(rng: random.Random, people: list[str], hours: int, days: int) -> list[_Rule]:
    """Every morning Ava finds 14, every night Ben loses 5."""
    chosen = sorted(rng.sample(HOURS, hours), key=HOURS.index)
    return [
        _Rule(hour, rng.choice(people), verb, sign, rng.randint(3, 99 if sign > 0 else max(3, 99 // days)))
        for hour, verb, sign in chosen
    ]


def _live(story: _Story) -> None:
    """Six days of every morning and every night."""
    for rule in story.rules:
        story.facts.append(f"Every {rule.hour} {rule.who} {rule.verb} {rule.by}.")
    if story.days:
        story.facts.append(f"This goes on for {story.days} days.")
    for day in range(1, story.days + 1):
        story.day = day
        story.lines.append(f"Day {day} of {story.days}.")
        for rule in story.rules:
            who, by = rule.who, rule.by
            have = story.amounts[who]
            if have + rule.sign * by < 2:
                raise _Impossible
            line = longhand.add(have, by) if rule.sign > 0 else longhand.subtract(have, by)
            amount = _fits(have + rule.sign * by)
            story.lines.append(f"In the {rule.hour} {who} {rule.verb} {by}. {who} {have}. {line} So {who} {amount}.")
            story.note(who, amount)


def _fits(amount: int) -> int:
    if not 2 <= amount <= LARGEST:
        raise _Impossible
    return amount


def _question(story: _Story) -> tuple[str, str, str, int]:
    """The question, what the notes say of it, the rest of the last line, the answer."""
    first, second = story.rng.sample(list(story.amounts), 2)
    a, b = story.amounts[first], story.amounts[second]
    kind = story.rng.choice(("total", "difference", "cost"))
    if kind == "total":
        text = f"How many {story.item} do {first} and {second} have in total?"
        asked, line, answer = f"{first} plus {second}", longhand.add(a, b), _fits(a + b)
    elif kind == "difference":
        if a <= b:
            raise _Impossible
        text = f"How many more {story.item} does {first} have than {second}?"
        asked, line, answer = f"{first} minus {second}", longhand.subtract(a, b), a - b
    else:
        price = story.rng.randint(2, 9)
        text = f"Each of the {story.item} costs {price} dollars. How many dollars are those of {first} worth?"
        line, answer = longhand.multiply(a, price), _fits(a * price)
        return text, f"{first} times {price}", f"{first} {a}. {line} That is {answer}.", answer
    return text, asked, f"{first} {a}. {second} {b}. {line} That is {answer}.", answer


_INTRODUCE: tuple[Callable[[_Story], None], ...] = (_compare, _compare, _times, _part, _together)


def _shapes(level: int) -> list[tuple[int, int, int]]:
    """Every (people, hours, days) that make `level` calculations."""
    plain = [(level + 1, 0, 0)] if level <= 2 else []
    return plain + [
        (people, hours, (level + 1 - people) // hours)
        for people in (2, 3)
        for hours in (1, 2, 3)
        if level + 1 > people and (level + 1 - people) % hours == 0 and (level + 1 - people) // hours <= MOST_DAYS
    ]


def _draw(rng: random.Random, level: int) -> WordProblem:
    """One problem with `level` calculations before the question; raises _Impossible when the numbers run away."""
    number, hours, days = rng.choice(_shapes(level))
    place = rng.randrange(len(NAMES))
    people = [NAMES[(place + step) % len(NAMES)] for step in range(number)]
    start = rng.randint(5, 99)
    item = rng.choice(ITEMS)
    rules = _make_rules(rng, people, hours, days)
    story = _Story(rng, item, people, {}, [f"{people[0]} has {start} {item}."], [], rules, days)
    story.note(people[0], start)
    for _ in range(number - 1):
        rng.choice(_INTRODUCE)(story)
    _live(story)
    question, asked, last, answer = _question(story)
    text = " ".join([*story.facts, question])
    solution = "\n".join([*story.lines, f"Asked {asked}. {last}", f"#### {answer}"]).replace(ASKED, asked)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return WordProblem(f"wp-{level}-{digest[:16]}", text, solution, str(answer), level)


def is_held_out(problem_id: str) -> bool:
    """Whether a generated problem belongs to the held-out split: a function of its text alone."""
    return int(problem_id.rsplit("-", 1)[1], 16) % HELD_OUT_SHARE == 0


def stream(seed: int, split: str, levels: Sequence[int]) -> Iterator[WordProblem]:
    """Endless problems of one split ("train" or "held-out"), levels drawn uniformly; a problem may come again."""
    if split not in ("train", "held-out"):
        raise BadInput(f"split {split!r}: expected 'train' or 'held-out'")
    wrong = [level for level in levels if level not in LEVELS]
    if wrong or not levels:
        raise BadInput(f"levels {list(levels)}: expected numbers from {LEVELS[0]} to {LEVELS[-1]}")
    rng = random.Random(f"{seed}/{split}")
    while True:
        level = rng.choice(levels)
        problem = _possible(rng, level)
        while is_held_out(problem.id) != (split == "held-out"):
            problem = _possible(rng, level)
        yield problem


def _possible(rng: random.Random, level: int) -> WordProblem:
    while True:
        try:
            return _draw(rng, level)
        except _Impossible:
            continue


def generate(seed: int, count: int, split: str, levels: Sequence[int]) -> list[WordProblem]:
    """`count` different problems of one split; the same for the same arguments, everywhere."""
    if count < 1:
        raise BadInput(f"count {count}: expected at least 1")
    found: dict[str, WordProblem] = {}
    for problem in stream(seed, split, levels):
        found.setdefault(problem.id, problem)
        if len(found) == count:
            break
    return list(found.values())
