import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from thinkfast.data.tokenizer import Tokenizer
from thinkfast.serve.text import TextStream, cut_at_stop


def byte_tokenizer() -> Tokenizer:
    """Every byte a token: characters come in halves."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({sign: index for index, sign in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, 0, 0, "", "", None, "")


BYTES = byte_tokenizer()


def pushed(text: str, stops: list[str], seed: int) -> tuple[list[str], TextStream]:
    chance, ids = random.Random(seed), BYTES.encode(text)
    stream, parts = TextStream(BYTES, stops), []
    while ids:
        size = chance.randint(1, 5)
        parts.append(stream.push(ids[:size]))
        ids = ids[size:]
    parts.append(stream.end())
    return parts, stream


@settings(deadline=None)
@given(st.text(max_size=40), st.integers(0, 99))
def test_the_parts_are_the_text(text: str, seed: int) -> None:
    parts, stream = pushed(text, [], seed)
    assert "".join(parts) == text
    assert not stream.stopped
    assert stream.tokens == len(text.encode())


@settings(deadline=None)
@given(
    st.text("abcé€", max_size=25), st.lists(st.text("abcé€", min_size=1, max_size=4), max_size=3), st.integers(0, 99)
)
def test_nothing_of_a_stop_string_is_ever_told(text: str, stops: list[str], seed: int) -> None:
    parts, stream = pushed(text, stops, seed)
    want, stopped = cut_at_stop(text, stops)
    assert stream.stopped == stopped
    if len(stops) < 2:  # which of several comes first may depend on where the pieces end
        assert "".join(parts) == want
    assert not any(stop in "".join(parts) for stop in stops)


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("abc", (), ("abc", False)),
        ("abcb", ("b",), ("a", True)),
        ("abc", ("c", "b"), ("a", True)),
        ("", ("a",), ("", False)),
    ],
)
def test_cutting(text: str, stops: tuple[str, ...], want: tuple[str, bool]) -> None:
    assert cut_at_stop(text, stops) == want
