"""Arithmetic written out digit by digit, the way it is taught at school.

Every function returns one line of text that a reader can check column by column; all numbers are non-negative integers.
"""

from __future__ import annotations

COLUMNS = ("ones", "tens", "hundreds", "thousands")


def _digits(number: int) -> list[int]:
    """Decimal digits, ones first."""
    return [int(digit) for digit in reversed(str(number))]


def _column(name: str, terms: str, value: int) -> str:
    return f"{name} {terms} = {value}"


def add(a: int, b: int) -> str:
    """a + b, from the ones up, with carries."""
    left, right = _digits(a), _digits(b)
    parts, carry = [], 0
    for place in range(max(len(left), len(right))):
        x = left[place] if place < len(left) else 0
        y = right[place] if place < len(right) else 0
        total = x + y + carry
        terms = f"{x} + {y}" + (f" + {carry}" if carry else "")
        carry = total // 10
        text = f"{COLUMNS[place]} {terms} = {total}, write {total % 10}"
        parts.append(text + (f", carry {carry}." if carry else "."))
    if carry:
        parts.append(f"{COLUMNS[len(parts)]} write {carry}.")
    return f"{a} + {b}: " + " ".join(parts)


def subtract(a: int, b: int) -> str:
    """a - b for a >= b, from the ones up, with borrows."""
    left, right = _digits(a), _digits(b)
    parts, borrow = [], 0
    for place, x in enumerate(left):
        y = right[place] if place < len(right) else 0
        terms = f"{y}" + (f" - {borrow}" if borrow else "")
        total = x - y - borrow
        if total < 0:
            text = f"{COLUMNS[place]} {x} - {terms}, borrow, {x + 10} - {terms} = {total + 10}"
            total += 10
            borrow = 1
        else:
            text = f"{COLUMNS[place]} {x} - {terms} = {total}"
            borrow = 0
        parts.append(f"{text}, write {total}.")
    return f"{a} - {b}: " + " ".join(parts)


def multiply(a: int, factor: int) -> str:
    """a * factor for a one-digit factor, from the ones up, with carries."""
    parts, carry = [], 0
    for place, x in enumerate(_digits(a)):
        total = x * factor + carry
        terms = f"{x} * {factor}" + (f" + {carry}" if carry else "")
        carry = total // 10
        text = f"{COLUMNS[place]} {terms} = {total}, write {total % 10}"
        parts.append(text + (f", carry {carry}." if carry else "."))
    if carry:
        parts.append(f"{COLUMNS[len(parts)]} write {carry}.")
    return f"{a} * {factor}: " + " ".join(parts)


def divide(a: int, divisor: int) -> str:
    """a / divisor for a one-digit divisor that divides a, from the highest digit down, with remainders."""
    parts, left = [], 0
    for place in range(len(_digits(a)) - 1, -1, -1):
        value = 10 * left + _digits(a)[place]
        quotient, left = divmod(value, divisor)
        parts.append(f"{COLUMNS[place]} {value} / {divisor} = {quotient}" + (f", left {left}." if left else "."))
    return f"{a} / {divisor}: " + " ".join(parts)
