"""A tokenisation that is killed goes on: at any step, the same bytes, nothing tokenised twice that was saved."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from thinkfast.data import sources, writer
from thinkfast.data.corpus import Corpus
from thinkfast.data.sources import Source, mixed
from thinkfast.data.tokenizer import load_tokenizer
from thinkfast.data.writer import write_documents
from thinkfast.recipe import Text
from thinkfast.stages import Stages, make_corpus

DOCUMENTS = [([n % 7], [n, n + 1], [3], [n]) if n % 3 else ([], [n] * (n % 5 + 1)) for n in range(40)]
FILES = ("tokens.bin", "index.npy", "gaps.npy", "corpus.json")


class Killed(BaseException):
    pass


def contents(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in FILES}


def begin(done: int):
    return iter(DOCUMENTS[done:])


def write(root: Path) -> None:
    write_documents(root, begin, "f", 66, [])


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SAVE_TOKENS", 20)


def test_stopped_at_any_document_or_step_it_goes_on_to_the_same_bytes(tmp_path, often, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    write(tmp_path / "whole")
    wanted, steps = contents(tmp_path / "whole"), 0
    while True:
        place, calls = tmp_path / str(steps), 0

        def tick(at=steps):
            nonlocal calls
            calls += 1
            if calls > at:
                raise Killed

        def stopping(honest, tick=tick):
            def call(*given, **options):
                tick()
                return honest(*given, **options)

            return call

        def counted(done, tick=tick):
            for document in begin(done):
                tick()
                yield document

        with monkeypatch.context() as patch:
            for module, name, honest in (
                (os, "fsync", lambda _: None),  # slow, and no matter to a process that is killed
                (os, "replace", os.replace),
                (shutil, "rmtree", shutil.rmtree),
            ):
                patch.setattr(module, name, stopping(honest))
            try:
                write_documents(place, counted, "f", 66, [])
            except Killed:
                steps += 1
            else:
                break
        write(place)
        assert contents(place) == wanted, steps
        assert not (place / writer.PART).exists()
    assert steps > len(DOCUMENTS) + 30


def test_what_was_saved_is_not_asked_for_again(tmp_path, often):
    def until(count):
        yield from DOCUMENTS[:count]
        raise Killed

    with pytest.raises(Killed):
        write_documents(tmp_path, lambda _: until(30), "f", 66, [])
    asked = []
    write_documents(tmp_path, lambda done: (asked.append(done), begin(done))[1], "f", 66, [])
    assert 20 < asked[0] <= 30
    assert [Corpus(tmp_path).document(n)[0] for n in range(40)] == [document[0] for document in DOCUMENTS]


@pytest.mark.parametrize("harm", ["another tokenizer", "another vocabulary", "a short file", "a missing file"])
def test_a_place_that_does_not_fit_is_begun_anew(tmp_path, often, harm):
    def until(count):
        yield from DOCUMENTS[:count]
        raise Killed

    with pytest.raises(Killed):
        write_documents(tmp_path, lambda _: until(30), "f", 66, [])
    part = tmp_path / writer.PART
    if harm == "a short file":
        os.truncate(part / "tokens", 10)
    elif harm == "a missing file":
        (part / "index").unlink()
    asked = []
    other = {"another tokenizer": ("g", 66), "another vocabulary": ("f", 70_000)}.get(harm, ("f", 66))
    write_documents(tmp_path, lambda done: (asked.append(done), begin(done))[1], *other, [])
    assert asked == [0]
    write_documents(tmp_path / "whole", begin, *other, [])
    assert contents(tmp_path) == contents(tmp_path / "whole")


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK", 4096)

    def peak(count: int) -> int:
        tracemalloc.start()
        write_documents(tmp_path / str(count), lambda _: (([1], [2], [3], [4]) for _ in range(count)), "f", 66, [])
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)  # what is imported on the way
    assert peak(8000) < 1.2 * peak(1000)


MIXED = """
import sys
from pathlib import Path
from thinkfast.data import sources, writer
from thinkfast.recipe import Text
from thinkfast.stages import Stages, make_corpus
import threading

writer.SAVE_TOKENS = 100
honest, taken = sources.rows, 0

def rows(source):
    global taken
    for row in honest(source):
        taken += 1
        if taken > 150:
            print("waiting", flush=True)
            threading.Event().wait()
        yield row

sources.rows = rows
settings = Text.model_validate_json(sys.argv[1])
make_corpus(settings, Path(sys.argv[2]), Path(sys.argv[3]), Stages(print))
"""


def test_kill_9_in_a_mixture_loses_and_doubles_nothing(tiny_teacher, tmp_path, monkeypatch):
    chat = [{"role": "user", "content": "Dan has 3"}, {"role": "assistant", "content": "Dan 3"}]
    rows = {"chats": [{"messages": chat * (1 + n % 3)} for n in range(40)]}
    rows["texts"] = [{"text": " ".join(["Ben has", str(n % 10)] * (1 + n % 5))} for n in range(60)]
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": w} for name, w in (("chats", 1.0), ("texts", 2.0))]
    raw = {"sources": named, "tokens": 3000, "held_out": 2}
    child = subprocess.Popen(
        [sys.executable, "-c", MIXED, json.dumps(raw), str(tiny_teacher), str(tmp_path / "cut")], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"waiting\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    saved = json.loads((tmp_path / "cut" / writer.PART / writer.PLACE).read_text())
    assert 0 < saved["documents"] <= 150
    assert max(count["passes"] for count in saved["sources"]) > 1

    settings, made = Text.model_validate_json(json.dumps(raw)), []
    monkeypatch.setattr(sources, "documents", _counting(made, sources.documents))
    make_corpus(settings, tiny_teacher, tmp_path / "whole", Stages(lambda _: None))
    whole = len(made)
    make_corpus(settings, tiny_teacher, tmp_path / "cut", Stages(lambda _: None))
    assert whole - saved["documents"] <= len(made) - whole <= whole - saved["documents"] + 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def _counting(made, honest):
    def documents(*given):
        for document in honest(*given):
            made.append(1)
            yield document

    return documents


@pytest.mark.parametrize("tokens", [None, 900])
def test_a_mixture_goes_on_from_its_counts(tmp_path, tiny_teacher, tokens):
    words = load_tokenizer(tiny_teacher)
    given = []
    for name, count, weight in (("a", 30, 1.0), ("b", 7, 1.0 if tokens is None else 2.5)):
        lines = [{"text": " ".join(["Dan"] * (1 + n % 4))} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        given.append(Source(str(tmp_path / f"{name}.jsonl"), weight))
    counts: list = []
    stream, wanted, states = mixed(given, words, tokens, counts), [], [[]]
    for document in stream:
        wanted.append(document)
        states.append([dict(count) for count in counts])
    for at in range(0, len(wanted) + 1, 5):
        assert list(mixed(given, words, tokens, [dict(count) for count in states[at]])) == wanted[at:]
    assert np.all([count["documents"] for count in counts])
