"""What a student learns from on its own policy: its answers to prompts of the corpus, drawn round after round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thinkfast import ranks
from thinkfast.errors import BadInput
from thinkfast.sections import OnPolicy

if TYPE_CHECKING:
    from thinkfast.data.corpus import Batch, Corpus, Cursor
    from thinkfast.model.config import DecoderConfig
    from thinkfast.model.decoder import Decoder


Student = Callable[[], "Decoder"]
"""Gives the student as it is at that moment, with all of its weights; all processes must call it in step."""


def answered(
    student: Student, corpus: Corpus, settings: OnPolicy, directory: Path
) -> tuple[Callable[[Cursor], Iterator[tuple[Batch, Cursor]]], dict[str, Any]]:
    """Batches of the student's own answers, round after round, and what fixes them. A round is drawn when its first
    batch is needed, by the student of that moment, and kept: a resumed run finds the same. All processes must read
    them in step."""
    from thinkfast.data.corpus import Cursor, batches

    def source(cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        place, position = cursor.epoch, cursor.position
        while True:
            drawn = _round(student, corpus, settings, directory / f"{place:05d}", place)
            for batch, following in batches(drawn, Cursor(cursor.seed, 0, position), settings.batch_tokens):
                last = following.epoch > 0
                yield batch, Cursor(cursor.seed, place + last, 0 if last else following.position)
                if last:
                    break
            place, position = place + 1, 0

    names = ("prompts", "share", "max_tokens", "sampling_temperature")
    return source, {f"on_policy.{name}": getattr(settings, name) for name in names}


def _round(student: Student, corpus: Corpus, settings: OnPolicy, directory: Path, place: int) -> Corpus:
    """The corpus of one round: prompts of `corpus` with the student's completion, or with their own."""
    from thinkfast.data.corpus import Corpus, write_corpus
    from thinkfast.engine import Engine, SamplingParams

    team = ranks.current()
    if team.agree((directory / "corpus.json").exists()):
        return Corpus(directory)
    random = np.random.default_rng([settings.seed, place])
    chosen = random.choice(len(corpus), min(settings.prompts, len(corpus)), replace=False)
    documents: list[Sequence[list[int]]] = [corpus.stretches(int(index)) for index in chosen]
    asked = np.flatnonzero((random.random(len(documents)) < settings.share) & [bool(d[0]) for d in documents]).tolist()
    params = SamplingParams(
        max_tokens=settings.max_tokens, temperature=settings.sampling_temperature, seed=settings.seed + place
    )
    if asked:
        # Each process answers its share; an answer depends on its prompt and the seed alone.
        mine, model = asked[team.rank :: team.size], student()
        prompts = [documents[i][0] for i in mine]
        samples = Engine(model.to(team.device), settings.slots).sample(prompts, 1, params) if mine else []
        answers = [(list(sample.token_ids), sample.finish_reason) for (sample,) in samples]
        for i, (ids, reason) in team.collect(list(zip(mine, answers, strict=True))):
            documents[i] = (documents[i][0], [*ids, *(model.config.eos_token_ids[:1] if reason == "stop" else ())])
    if not team.rank:
        write_corpus(directory, documents, corpus.fingerprint, corpus.vocab_size)
    team.wait()
    return Corpus(directory)


def check_room(corpus: Corpus, settings: OnPolicy, config: DecoderConfig) -> None:
    """Raises BadInput where an answer could outgrow the model's positions."""
    longest = int(corpus.prompt_lengths.max()) + settings.max_tokens
    if longest > config.max_position_embeddings:
        raise BadInput(
            f"on_policy.max_tokens {settings.max_tokens}: with the longest prompt that is {longest} tokens, "
            f"the model has {config.max_position_embeddings} positions"
        )
