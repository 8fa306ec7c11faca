"""Training text from several places at once: rows of files and Hugging Face data sets, mixed by weight.

A row is a conversation (`messages`), a problem with its solution (`problem`, `solution`) or plain text (`text`); it
becomes a document of alternating stretches of ids, the first given and the second to be learnt, and so on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from thinkfast.data.chat import render_chat, render_prompt
from thinkfast.data.tokenizer import Tokenizer
from thinkfast.errors import BadInput

HUB = "hf:"
SUFFIXES = (".jsonl", ".parquet", ".txt")
PARQUET_ROWS = 1024
Document = Sequence[list[int]]


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: a file, a pattern of files such as `data/*.parquet`, or `hf:owner/name` with its
    configuration and split. `weight` is its share of the tokens, relative to the other sources'; `text` and `solution`
    are what its columns of that meaning are called."""

    path: str
    weight: float = 1.0
    split: str = "train"
    config: str | None = None
    text: str = "text"
    solution: str = "solution"

    def files(self) -> list[Path]:
        """The files on this machine. Raises BadInput where there are none."""
        return [] if self.path.startswith(HUB) else _files(self.path)


def check_sources(sources: Sequence[Source], tokens: int | None) -> None:
    """Raises BadInput for sources that are not there, before anything long begins, and for weights without a number of
    tokens to hold them for."""
    for source in sources:
        source.files()
    if tokens is None and len({source.weight for source in sources}) > 1:
        raise BadInput("corpus.sources: weights that differ need corpus.tokens, the number of tokens to mix")


def mixed(
    sources: Sequence[Source], tokenizer: Tokenizer, tokens: int | None, counts: list[dict[str, Any]]
) -> Iterator[Document]:
    """Documents of all sources until there are `tokens` of them; the next one always comes from the source that is
    furthest behind its weight, and a source that ends begins again. Without `tokens` every source is read once.

    `counts` holds for every source its path, documents, tokens, how often it was begun and the rows of it that were
    taken since; given those of any moment the documents after it follow. A function of the sources alone. Raises
    BadInput naming the source and the row that cannot be used, or a source without rows.
    """
    if not counts:
        counts += [{"path": source.path, "documents": 0, "tokens": 0, "passes": 1, "rows": 0} for source in sources]
    streams = [documents(source, tokenizer, count["rows"]) for source, count in zip(sources, counts, strict=True)]
    open_ = list(range(len(sources)))
    while open_ and (tokens is None or sum(count["tokens"] for count in counts) < tokens):
        at = min(open_, key=lambda index: (counts[index]["tokens"] / sources[index].weight, index))
        count, document = counts[at], next(streams[at], None)
        if document is not None:
            count["documents"] += 1
            count["rows"] += 1
            count["tokens"] += sum(map(len, document))
            yield document
        elif not count["documents"]:
            raise BadInput(f"{sources[at].path}: no rows in it")
        elif tokens is None:
            open_.remove(at)
        else:
            count["passes"] += 1
            count["rows"] = 0
            streams[at] = documents(sources[at], tokenizer)


def documents(source: Source, tokenizer: Tokenizer, skip: int = 0) -> Iterator[Document]:
    """One pass over a source behind its first `skip` rows, each of which is a document. Raises BadInput naming the
    file, the row and the field that is the matter."""
    for where, row in islice(rows(source), skip, None):
        if not isinstance(row, Mapping):
            raise BadInput(f"{where}: expected an object, got {type(row).__name__}")
        if "messages" in row:
            yield conversation(row["messages"], tokenizer, where)
        elif "problem" in row or source.solution in row:
            problem, solution = (_text(row, name, where) for name in ("problem", source.solution))
            yield render_prompt(tokenizer, problem), [*tokenizer.encode(solution), tokenizer.eos_id]
        elif source.text in row:
            # What the tokenizer itself puts before a text: Llama's models need their first token to be that one.
            begin: list[int] = tokenizer.backend.encode("", add_special_tokens=True).ids
            yield begin, [*tokenizer.encode(_text(row, source.text, where)), tokenizer.eos_id]
        else:
            raise BadInput(
                f"{where}: expected messages, problem and {source.solution}, or {source.text}; "
                f"it has {', '.join(map(str, row))}"
            )


def conversation(messages: Any, tokenizer: Tokenizer, where: str) -> Document:
    """Turns as alternating stretches: everything up to an assistant's turn, the turn, everything up to the next one.

    What follows the last assistant's turn is left out. Raises BadInput where there is none, or where the template
    renders the beginning of a conversation otherwise than the whole of it.
    """
    if not isinstance(messages, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        raise BadInput(f"{where}: messages: expected a list of objects with role and content")
    stretches: list[list[int]] = []
    done = ""
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before, after = _rendered(messages, index, tokenizer)
        if not after.startswith(before) or not before.startswith(done):
            raise BadInput(f"{where}: messages: the chat template changes earlier turns when later ones follow")
        stretches += [tokenizer.encode(before[len(done) :]), tokenizer.encode(after[len(before) :])]
        done = after
    if not stretches:
        raise BadInput(f"{where}: messages: no turn of an assistant")
    return stretches


def _rendered(messages: list[Any], index: int, tokenizer: Tokenizer) -> tuple[str, str]:
    """The text up to an assistant's turn, ready to be answered, and the text with it."""
    if tokenizer.chat_template is not None:
        before = render_chat(tokenizer, messages[:index])
        return before, render_chat(tokenizer, messages[: index + 1], answer=False)
    # Without a template a turn is a line, and an answer ends with the end of the text.
    lines = [turn["content"] + (tokenizer.eos_token if turn["role"] == "assistant" else "\n") for turn in messages]
    before = tokenizer.bos_token + "".join(lines[:index])
    return before, before + lines[index]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{where}: {name}: expected text, got {value!r}")
    return value


def rows(source: Source) -> Iterator[tuple[str, Any]]:
    """The rows of a source, each with the words that name it in a complaint."""
    if source.path.startswith(HUB):
        yield from _hub(source)
        return
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]]
    readers = {".jsonl": _jsonl, ".parquet": _parquet, ".txt": _plain}
    for file in source.files():
        yield from readers[file.suffix](file)


def _files(path: str) -> list[Path]:
    place = Path(path)
    found = [place] if place.is_file() else sorted(place.parent.glob(place.name))
    if not found:
        raise BadInput(f"{path}: no such file")
    for file in found:
        if file.suffix not in SUFFIXES or not file.is_file():
            raise BadInput(f"{file}: expected a file that ends in one of {', '.join(SUFFIXES)}")
    return found


def _jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield f"{file}: row {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{file}: row {number}: not valid JSON: {error.msg}") from None


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{file}: not a Parquet file: {str(error).splitlines()[0]}") from error


def _plain(file: Path) -> Iterator[tuple[str, Any]]:
    """Documents with an empty line between them."""
    kept: list[str] = []
    start = 1
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(chain(lines, [""]), 1):
            if line.strip():
                start = start if kept else number
                kept.append(line)
            elif kept:
                yield f"{file}: line {start}", {"text": "".join(kept).strip()}
                kept = []


def _hub(source: Source) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise BadInput(f"{source.path}: data sets need the extra: pip install 'thinkfast[data]'") from None
    try:
        table = datasets.load_dataset(source.path.removeprefix(HUB), source.config, split=source.split, streaming=True)
        for number, row in enumerate(table, 1):
            yield f"{source.path}: row {number}", row
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise BadInput(f"{source.path}: cannot be loaded: {str(error).splitlines()[0]}") from error
