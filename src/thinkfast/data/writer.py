"""Writes a corpus directory (its files: `corpus.py`) document by document, in bounded memory, and goes on when killed.

What is written grows in the hidden folder `.part`: `tokens`, `index` and `gaps` without a header, and `place.json`,
which says how much of them counts. It is replaced every million tokens, behind the data that it speaks of, so what lies
beyond it is cut off and made again. Files get their names at the end, `corpus.json` last.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from thinkfast import records
from thinkfast.errors import BadInput

FORMAT = 1
SAVE_TOKENS = 1 << 20
PART, PLACE = ".part", "place.json"
ROWS = {"index": 2, "gaps": 3}
"""Numbers (int64) of a row: offset and prompt length of a document; document, begin and end of a gap."""
BLOCK = 1 << 20
Documents = Iterable[Sequence[list[int]]]


@dataclass
class _Place:
    """How much of a corpus is written, and where its sources stand."""

    fingerprint: str
    dtype: str
    documents: int = 0
    tokens: int = 0
    completion_tokens: int = 0
    gaps: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)

    def bytes(self) -> dict[str, int]:
        """What counts of each growing file."""
        rows = {"index": self.documents, "gaps": self.gaps}
        return {"tokens": self.tokens * np.dtype(self.dtype).itemsize} | {n: r * ROWS[n] * 8 for n, r in rows.items()}


def write_documents(
    root: Path,
    documents: Callable[[int], Documents],
    fingerprint: str,
    vocab_size: int,
    sources: list[dict[str, Any]],
) -> None:
    """Makes `root` a corpus of documents of (prompt ids, completion ids, prompt ids, ...), or goes on with one that was
    begun: documents(n) gives those from the n-th on.

    `sources` is kept with every saved place and put back before `documents` is called; it is noted in corpus.json.
    Raises BadInput when an id does not fit the vocabulary, and when there is no completion token at all.
    """
    part = root / PART
    part.mkdir(parents=True, exist_ok=True)
    (root / "corpus.json").unlink(missing_ok=True)
    place = _Place(fingerprint, np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4").str)
    place = _begun(root, place) or place
    sources[:] = place.sources
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files = {name: stack.enter_context((part / name).open("a+b")) for name in place.bytes()}
        for name, size in place.bytes().items():
            files[name].truncate(size)
        _read(files["tokens"], digest.update)
        saved = place.tokens
        for document in documents(place.documents):
            _append(document, files, place, vocab_size, digest.update, root)
            if place.tokens - saved >= SAVE_TOKENS:
                _save(part, files, place, sources)
                saved = place.tokens
        check_counts(root, place.documents, place.completion_tokens)
        _save(part, files, place, sources)
        end = struct.pack("<qq", place.tokens, 0)
        _read(files["index"], digest.update)
        digest.update(end)
        _array(root / "index.npy", files["index"], place.documents + 1, 2, end)
        if place.gaps:
            _read(files["gaps"], digest.update)
            _array(root / "gaps.npy", files["gaps"], place.gaps, 3)
    (part / "tokens").replace(root / "tokens.bin")
    description = {
        "format": FORMAT,
        "documents": place.documents,
        "tokens": place.tokens,
        "completion_tokens": place.completion_tokens,
        "dtype": place.dtype,
        "vocab_size": vocab_size,
        "tokenizer": fingerprint,
        "sha256": digest.hexdigest(),
        "gaps": place.gaps,
        "sources": [dict(source) for source in sources],
    }
    records.write_json(root / "corpus.json", description)
    shutil.rmtree(part)


def check_counts(root: Path, documents: int, completion_tokens: int) -> None:
    """Raises BadInput for a corpus that teaches nothing."""
    if not documents:
        raise BadInput(f"{root}: the corpus holds no document")
    if not completion_tokens:
        raise BadInput(f"{root}: no document has a completion token, so there is nothing to learn from")


def _begun(root: Path, wanted: _Place) -> _Place | None:
    """The last saved place, if what it speaks of is there and is of the same tokenizer."""
    part = root / PART
    if not (part / PLACE).exists():
        return None
    place = _Place(**records.read_json(part / PLACE))
    if not (part / "tokens").exists() and (root / "tokens.bin").exists():
        # Killed between the last two steps.
        (root / "tokens.bin").replace(part / "tokens")
    sizes = {name: (part / name).stat().st_size if (part / name).exists() else -1 for name in place.bytes()}
    known = (place.fingerprint, place.dtype) == (wanted.fingerprint, wanted.dtype)
    return place if known and all(sizes[name] >= size for name, size in place.bytes().items()) else None


def _append(
    document: Sequence[list[int]],
    files: Mapping[str, IO[bytes]],
    place: _Place,
    vocab_size: int,
    digest: Callable[[bytes], None],
    root: Path,
) -> None:
    ids = np.asarray([token for stretch in document for token in stretch], dtype=np.int64)
    if not len(ids) or ids.min() < 0 or ids.max() >= vocab_size:
        raise BadInput(f"{root}: document {place.documents} is empty or has an id outside 0..{vocab_size - 1}")
    data = ids.astype(place.dtype).tobytes()
    digest(data)
    files["tokens"].write(data)
    files["index"].write(struct.pack("<qq", place.tokens, len(document[0])))
    ends = np.cumsum([len(stretch) for stretch in document]).tolist()
    for at in range(2, len(ends), 2):
        files["gaps"].write(struct.pack("<qqq", place.documents, ends[at - 1], ends[at]))
        place.gaps += 1
    place.documents += 1
    place.tokens += len(ids)
    place.completion_tokens += sum(map(len, document[1::2]))


def _save(part: Path, files: Mapping[str, IO[bytes]], place: _Place, sources: list[dict[str, Any]]) -> None:
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    records.write_json(part / PLACE, {**asdict(place), "sources": sources})


def _read(file: IO[bytes], take: Callable[[bytes], object]) -> None:
    """All of a file, in blocks."""
    file.seek(0)
    while block := file.read(BLOCK):
        take(block)


def _array(path: Path, rows: IO[bytes], count: int, width: int, end: bytes = b"") -> None:
    """Rows of int64 as an array that numpy loads, under its name when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as out:
        header = {"descr": "<i8", "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(out, header)
        _read(rows, out.write)
        out.write(end)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
