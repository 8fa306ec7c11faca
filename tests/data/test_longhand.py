"""Every written-out calculation states the right result and right columns."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from thinkfast.data import longhand

numbers = st.integers(0, 9999)


def written(line: str) -> int:
    """The number that the `write` marks spell, ones first; the last may be two digits wide."""
    digits = re.findall(r"write (\d+)", line)
    return int("".join(reversed(digits)))


def equations_hold(line: str) -> None:
    body = line.split(":", 1)[1]
    for left, right in re.findall(r"((?:\d+ [-+*] )+\d+) = (\d+)", body):
        tokens = left.split()
        total = int(tokens[0])
        for sign, operand in zip(tokens[1::2], tokens[2::2], strict=True):
            total = {"+": total + int(operand), "-": total - int(operand), "*": total * int(operand)}[sign]
        assert total == int(right), line


@given(st.integers(0, 999), st.integers(0, 999))
def test_addition_writes_the_sum(a: int, b: int) -> None:
    line = longhand.add(a, b)
    assert written(line) == a + b
    equations_hold(line)


@given(st.integers(0, 999), st.integers(0, 999))
def test_subtraction_writes_the_difference(a: int, b: int) -> None:
    high, low = max(a, b), min(a, b)
    line = longhand.subtract(high, low)
    assert written(line) == high - low
    equations_hold(line)


@given(st.integers(0, 999), st.integers(2, 9))
def test_multiplication_writes_the_product(a: int, factor: int) -> None:
    line = longhand.multiply(a, factor)
    assert written(line) == a * factor
    equations_hold(line)


@given(st.integers(1, 200), st.integers(2, 9))
def test_division_writes_the_quotient(quotient: int, divisor: int) -> None:
    line = longhand.divide(quotient * divisor, divisor)
    columns = re.findall(r"(\d+) / \d = (\d+)(?:, left (\d))?", line.split(":", 1)[1])
    assert int("".join(digit for _, digit, _ in columns)) == quotient
    for value, digit, left in columns:
        assert int(value) == int(digit) * divisor + int(left or 0)
