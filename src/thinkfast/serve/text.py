"""Text out of token ids as they come: no half characters, nothing that may still turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from thinkfast.data.tokenizer import Tokenizer

HALF = "\ufffd"


class TextStream:
    """Decodes a sample piece by piece. `stopped` is set once one of `stops` appears; the text ends before it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._start = self._read = 0  # the window that is decoded again, and what of it has been read
        self._held = ""
        self.stopped = False

    @property
    def tokens(self) -> int:
        """Tokens it has been given."""
        return len(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now and was not before."""
        if self.stopped:
            return ""
        self._ids += ids
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        after = self._tokenizer.decode(self._ids[self._start :])
        if len(after) <= len(before) or after.endswith(HALF):
            return ""
        self._start, self._read = self._read, len(self._ids)
        self._held += after[len(before) :]
        return self._release()

    def end(self) -> str:
        """What was held back, at the end of the sample."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        self._held += self._tokenizer.decode(self._ids[self._start :])[len(before) :]
        certain = self._release()
        rest, self._held = self._held, ""
        return certain + ("" if self.stopped else rest)

    def _release(self) -> str:
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
