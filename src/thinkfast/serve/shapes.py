"""Responses in OpenAI's shapes, whole or in chunks, with `thinkfast` beside them where there was a vote."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from thinkfast.data.tokenizer import Tokenizer
from thinkfast.engine.live import Piece
from thinkfast.engine.live import Request as Drawing
from thinkfast.engine.sampling import STOP
from thinkfast.serve.ballot import Chain, Outcome
from thinkfast.serve.draw import Delta
from thinkfast.serve.vote import Plan


class ErrorFacts(BaseModel):
    """What went wrong, with which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """OpenAI's error object."""

    error: ErrorFacts


class Job:
    """One request on its way: what is drawn for it, and what has been so far."""

    def __init__(self, model: str, chat: bool, prompt_tokens: int, facts: dict[str, Any]) -> None:
        self.model, self.chat, self.prompt_tokens, self.facts = model, chat, prompt_tokens, facts
        self.plan: Plan | None = None
        self.request: Drawing | None = None
        self.samples = self.tokens = self.ended_tokens = 0
        self.ended = 0.0
        """When the outcome was known, on `time.monotonic()`."""

    def note(self, event: Chain | Outcome | Delta) -> None:
        """Counts what an event brings, for usage, figures and log."""
        if isinstance(event, Chain):
            self.samples, self.tokens = self.samples + 1, self.tokens + event.tokens
            self.ended_tokens += event.tokens if event.finish_reason == STOP else 0
        elif isinstance(event, Outcome):
            self.tokens, self.ended = event.tokens, time.monotonic()
            self.facts |= {"stopped": event.stopped, "answered": event.answer is not None}
        elif event.reason is not None:
            self.samples, self.tokens = self.samples + 1, self.tokens + event.tokens
            self.ended_tokens += event.tokens if event.reason == STOP else 0
        self.facts |= {"samples": self.samples, "completion_tokens": self.tokens}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt, and all that were drawn for it, also those of chains that did not end."""
        total = self.prompt_tokens + self.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}


class Writer:
    """Turns the events of a job into one document, or into chunks.

    likeliest: alternatives beside each token, None for no log-probabilities. samples: chains are given with their text.
    usage: the stream ends with a chunk that holds it.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, likeliest: int | None, samples: bool, usage: bool) -> None:
        self._job, self._tokenizer, self._likeliest = job, tokenizer, likeliest
        self._samples, self._usage = samples, usage
        self._id = f"{'chatcmpl' if job.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._begun: set[int] = set()
        plan = job.plan
        self._ballot = None if plan is None else plan.ballot

    def whole(self, events: Sequence[Chain | Outcome | Delta]) -> dict[str, Any]:
        """The response when everything is there."""
        kind = "chat.completion" if self._job.chat else "text_completion"
        document = {"id": self._id, "object": kind, "created": self._created, "model": self._job.model}
        if self._job.plan is not None:
            outcome = next(event for event in events if isinstance(event, Outcome))
            chains = [event for event in events if isinstance(event, Chain)]
            text, reason = _winner(outcome)
            found = outcome.document()
            if self._samples:
                found["chains"] = [chain.document(text=True) for chain in chains]
            choices = [self._choice(0, text, reason, None)]
            return {**document, "choices": choices, "usage": self._job.usage(), "thinkfast": found}
        deltas = [event for event in events if isinstance(event, Delta)]
        choices = []
        for index in sorted({delta.index for delta in deltas}):
            mine = [delta for delta in deltas if delta.index == index]
            text, reason = "".join(delta.text for delta in mine), next(delta.reason for delta in mine if delta.reason)
            pieces = [delta.piece for delta in mine if delta.piece is not None]
            choices.append(self._choice(index, text, reason, self._logprobs(pieces)))
        return {**document, "choices": choices, "usage": self._job.usage()}

    def chunks(self, event: Chain | Outcome | Delta) -> Iterator[dict[str, Any]]:
        """The chunks that an event becomes."""
        if isinstance(event, Delta):
            yield from self._begin(event.index)
            logprobs = None if event.piece is None else self._logprobs([event.piece])
            if event.text or logprobs:
                yield self._chunk([self._part(event.index, event.text, None, logprobs)])
            if event.reason:
                yield self._chunk([self._part(event.index, "", event.reason, None)])
        elif isinstance(event, Chain):
            assert self._ballot is not None
            self._ballot.add(event)
            assert self._job.plan is not None
            so_far = self._ballot.outcome(time.monotonic() - self._job.plan.started, "")
            told = {"chain": event.document(self._samples), "votes": so_far.votes, "samples": so_far.samples}
            yield self._chunk([]) | {"thinkfast": {**told, "seconds": round(so_far.seconds, 4)}}
        else:
            text, reason = _winner(event)
            yield from self._begin(0)
            yield self._chunk([self._part(0, text, None, None)])
            yield self._chunk([self._part(0, "", reason, None)]) | {"thinkfast": event.document()}

    def last(self) -> Iterator[dict[str, Any]]:
        """What follows the last event."""
        if self._usage:
            yield self._chunk([]) | {"usage": self._job.usage()}

    def _begin(self, index: int) -> Iterator[dict[str, Any]]:
        if self._job.chat and index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._job.chat else "text_completion"
        chunk = {"id": self._id, "object": kind, "created": self._created, "model": self._job.model}
        return {**chunk, "choices": choices, **({"usage": None} if self._usage else {})}

    def _part(self, index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self._job.chat:
            said = {"delta": {"content": text} if text or reason is None else {}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _choice(self, index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self._job.chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if self._likeliest is None:
            return None
        rows = [
            (token, logprob, piece.alternatives[at] if piece.alternatives else ())
            for piece in pieces
            for at, (token, logprob) in enumerate(zip(piece.token_ids, piece.logprobs, strict=True))
        ]
        if self._job.chat:
            content = [
                {**self._token(token, logprob), "top_logprobs": [self._token(*other) for other in likely]}
                for token, logprob, likely in rows
            ]
            return {"content": content, "refusal": None}
        texts = [self._tokenizer.decode([token]) for token, _, _ in rows]
        offsets = [sum(map(len, texts[:at])) for at in range(len(texts))]
        top = [{self._tokenizer.decode([other]): value for other, value in likely} for _, _, likely in rows]
        values = [logprob for _, logprob, _ in rows]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _winner(outcome: Outcome) -> tuple[str, str]:
    """The text that is the answer, and why it ends; an empty one where no chain has ended."""
    return ("", "length") if outcome.chain is None else (outcome.chain.text, "stop")
