"""The answer that a completion states: the rules of extraction, and what is taken off an answer.

Nothing here knows mathematics; whether two answers are equal is `scale/grade.py`'s.
"""

import re

_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_COUNTED = re.compile(r"(\$?[+-]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?) +([a-z]+(?: [a-z]+)*)\.?", re.IGNORECASE)
_SCALING = re.compile(
    r"and|or|to|plus|minus|times|by|over|percent|pct|half|halves|\w*(third|quarter|fourth|fifth|sixth|eighth|tenth)s?"
    r"|dozens?|hundreds?|thousands?|millions?|billions?|trillions?|k|m|[a-z]",
    re.IGNORECASE,
)
_STATED = (
    re.compile(r"####[ \t]*(.+)"),
    re.compile(r"answer is:?[ \t]*(.+?)(?=\.\s|\.?$)", re.IGNORECASE | re.MULTILINE),
    re.compile(r"^[ \t*]*(?:final answer|answer|a)[ \t*]*:[ \t*]*(.+)", re.IGNORECASE | re.MULTILINE),
)


def extract_answer(text: str) -> str | None:
    r"""The answer a completion states, or None.

    The first of these rules that applies decides: the last \boxed{...}, where one that is cut off means no answer
    rather than an earlier box; the last "#### X"; the last "the answer is X", up to the end of the sentence; the last
    line "Answer: X" or "A: X". A dollar sign, a final full stop and thousands commas are taken off, and so are words
    after a number that only say what is counted ("18 dollars").
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start >= 0:
        content = boxed(text[start:])
        return tidy(content) or None if content is not None else None
    for rule in _STATED:
        found = rule.findall(text)
        if found:
            return tidy(_without_unit(found[-1].strip())) or None
    return None


def _without_unit(stated: str) -> str:
    found = _COUNTED.fullmatch(stated)
    if found and not any(_SCALING.fullmatch(word) for word in found[2].split()):
        return found[1]
    return stated


def boxed(text: str) -> str | None:
    """Content of the box that text begins with; None when it is not closed."""
    body = re.sub(r"^\\[a-z]+\s*", "", text)
    if not body.startswith("{"):
        bare = re.match(r"[^\s$]+", body)
        return bare.group() if bare else None
    depth, escaped = 0, False
    for position, character in enumerate(body):
        if escaped or character == "\\":
            escaped = not escaped
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return body[1:position]
    return None


def tidy(answer: str) -> str:
    """The answer without outer spaces, math delimiters, emphasis, currency, full stop and thousands commas."""
    text, before = answer.replace("−", "-").strip(), None
    while text != before:
        before = text
        text = text.removeprefix("\\$").removesuffix("\\$").removeprefix("**").removesuffix("**")
        if text.endswith(".") and not text.endswith(("..", "\\right.")):
            text = text[:-1]
        for opening, closing in _WRAPPERS:
            inside = text[len(opening) : -len(closing)]
            if text == opening + inside + closing and opening not in inside and closing not in inside:
                text = inside
        if text.count("$") == 1:
            text = text.strip("$")
        text = text.strip()
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3})", "", text)
    if re.search(r"[()\[\]={}]", text) is None:
        text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    return text
