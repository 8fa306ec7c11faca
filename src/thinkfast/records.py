"""What stands on disk: stages with their run.json, and typed rows of samples and scores.

Nothing is ever half written under its final name: every file is written beside its place, flushed to the disk and
renamed. A stage is a directory with a run.json; its hash covers the stage's name, settings, seed and the hashes of its
inputs, and neither times nor places.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from thinkfast import runtime
from thinkfast.errors import BadInput

RECORD = "run.json"
MODEL_FILES = ("config.json", "*.safetensors", "tokenizer*.json", "chat_template.jinja")
"""What makes a model directory that model; logs and training states do not."""


class Failed(Exception):
    """A stage that cannot go on. The message is one line; the command line prints it and exits with status 1."""


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically: a reader sees the old file or the whole new one. OSErrors name `path`.

    A device or a pipe is written to; a file in its place would take it from everybody.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, document: object) -> None:
    """Writes one JSON document, atomically. NaN and infinity are refused with ValueError."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def publish(figures: Mapping[str, Any], path: Path | None) -> None:
    """Prints figures as one line of JSON, with the command, code and machine behind them; stores them in `path`, too,
    where it is given."""
    told = {"command": runtime.command(), "code": runtime.code_version(), "machine": runtime.machine()}
    document = {**figures, **told}
    print(json.dumps(document))
    if path is not None:
        write_json(path, document)


def read_json(path: Path) -> Any:
    """Reads one JSON document; BadInput names the file when it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a JSON document: {error}") from None


def hash_path(path: Path, patterns: Sequence[str] = ("*",)) -> str:
    """SHA-256 of a file's content, or of the names and contents of a directory's files whose names match a pattern.

    Neither run.json nor hidden files count. Raises BadInput when there is nothing at `path`.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or directory")
    digest = hashlib.sha256()
    for file_path in sorted(path.rglob("*")):
        name = file_path.name
        counts = name != RECORD and not name.startswith(".") and any(fnmatch(name, pattern) for pattern in patterns)
        if file_path.is_file() and counts:
            digest.update(f"{file_path.relative_to(path).as_posix()}\0{hash_path(file_path)}\n".encode())
    return digest.hexdigest()


@dataclass(slots=True)
class Stage:
    """An open stage. `done`: complete for the same hash, nothing to do. `resuming`: begun before with the same hash."""

    directory: Path
    record: dict[str, Any]
    done: bool
    resuming: bool
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Identifies what this stage makes; an input of the stages behind it."""
        return str(self.record["hash"])

    @property
    def seconds(self) -> float:
        """Seconds the stage took over all its sessions, 0.0 while it has not ended."""
        return float(self.record.get("seconds", 0.0))

    def note(self, key: str, value: object) -> None:
        """Keeps a fact about this run (a measurement, a resume) in run.json, at once."""
        self.notes[key] = value
        self.save()

    def save(self) -> None:
        """Writes run.json."""
        write_json(self.directory / RECORD, {**self.record, "notes": self.notes})


@contextmanager
def stage(
    directory: Path,
    *,
    name: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> Iterator[Stage]:
    """Opens `directory` as the output of one stage; leaving the block without an exception completes it.

    A KeyboardInterrupt leaves it with the directory as its argument. Raises BadInput when the directory holds something
    else, or the same stage made from other settings or inputs.
    """
    wanted = {"stage": name, "settings": dict(settings), "inputs": dict(inputs or {}), "seed": seed}
    wanted = json.loads(json.dumps(wanted))
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    previous = _previous(directory)
    if previous is not None and previous["hash"] != digest:
        raise BadInput(f"{directory}: {_difference(previous, wanted)}; remove it or choose another directory")
    if previous is not None and previous["status"] == "complete":
        yield Stage(directory, previous, done=True, resuming=False, notes=previous.get("notes", {}))
        return
    started = datetime.now(UTC)
    before = previous or {}
    record = {
        **wanted,
        "hash": digest,
        "command": runtime.command(),
        "code": runtime.code_version(),
        "versions": runtime.versions(),
        "machine": runtime.machine(),
        "started": before.get("started", started.isoformat(timespec="seconds")),
        "ended": None,
        "status": "running",
    }
    opened = Stage(directory, record, done=False, resuming=previous is not None, notes=before.get("notes", {}))
    opened.save()
    try:
        yield opened
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(directory)) from interrupt
    finally:
        earlier = float(before.get("seconds", 0.0))
        record["seconds"] = round(earlier + (datetime.now(UTC) - started).total_seconds(), 3)
        opened.save()
    record["ended"] = datetime.now(UTC).isoformat(timespec="seconds")
    record["status"] = "complete"
    opened.save()


def read_record(directory: Path) -> dict[str, Any] | None:
    """The run.json of a directory, None where there is none."""
    path = directory / RECORD
    if not path.exists():
        return None
    record = read_json(path)
    if not isinstance(record, dict) or not {"stage", "settings", "inputs", "hash", "status"} <= record.keys():
        raise BadInput(f"{path}: not the record of a stage: expected the keys stage, settings, inputs, hash and status")
    return record


def _previous(directory: Path) -> dict[str, Any] | None:
    if directory.exists() and not directory.is_dir():
        raise BadInput(f"{directory}: is a file, expected a directory")
    record = read_record(directory)
    if record is None and directory.is_dir() and any(not p.name.startswith(".") for p in directory.iterdir()):
        raise BadInput(f"{directory}: holds files but no {RECORD}; remove it or choose another directory")
    return record


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first difference between two stages, in words."""
    if old["stage"] != new["stage"]:
        return f"holds the stage {old['stage']!r}, not {new['stage']!r}"
    before, after = _flat(old["settings"]), _flat(new["settings"])
    before["seed"], after["seed"] = before.get("seed", old.get("seed")), after.get("seed", new["seed"])
    for key in [*after, *before]:
        if before.get(key) != after.get(key):
            return f"was made with {key} = {json.dumps(before.get(key))}, not {json.dumps(after.get(key))}"
    changed = [key for key in [*new["inputs"], *old["inputs"]] if old["inputs"].get(key) != new["inputs"].get(key)]
    return f"was made from another {changed[0]}" if changed else "was made with other settings"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps a second process out of `directory` while the block runs; BadInput when one is already there."""
    import fcntl

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{directory}: another thinkfast is working here") from None
        yield


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One completion. Seconds lie on one monotonic clock that starts with the model's first prefill."""

    problem_id: str
    sample_index: int
    seed: int
    text: str
    token_count: int
    finish_reason: str
    t_start: float
    t_end: float
    logprob_sum: float
    model: str


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One graded completion; `answer_class` numbers mathematically equal answers of a problem, -1 means no answer."""

    problem_id: str
    sample_index: int
    answer: str | None
    answer_class: int
    correct: bool


@dataclass(frozen=True, slots=True)
class RewardRow:
    """The reward of one completion; `steps` are those of its steps as a JSON list, `seconds` what it took to score."""

    problem_id: str
    sample_index: int
    reward: float
    steps: str
    seconds: float


Row = SampleRow | ScoreRow | RewardRow
R = TypeVar("R", SampleRow, RewardRow)
_TYPES = {"str": "string", "int": "int64", "float": "float64", "bool": "bool_", "str | None": "string"}


def write_rows(path: Path, rows: list[Any], row_type: type[Row]) -> None:
    """Writes rows of one type as a Parquet file, atomically."""
    import pyarrow
    import pyarrow.parquet

    names = row_type.__dataclass_fields__
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=_schema(row_type)), sink, compression="zstd")
    write_bytes(path, sink.getvalue().to_pybytes())


def _schema(row_type: type[Row]) -> Any:
    import pyarrow

    kinds = {name: str(entry.type) for name, entry in row_type.__dataclass_fields__.items()}
    return pyarrow.schema(
        [
            pyarrow.field(name, getattr(pyarrow, _TYPES[kind])(), nullable=kind.endswith("None"))
            for name, kind in kinds.items()
        ]
    )


def _read_rows(path: Path, row_type: type[Any]) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        table = pyarrow.parquet.read_table(path, partitioning=None)
        missing = [name for name in row_type.__dataclass_fields__ if name not in table.column_names]
        if missing:
            raise BadInput(f"{path}: lacks the column {missing[0]!r}")
        columns = table.select(list(row_type.__dataclass_fields__)).cast(_schema(row_type)).to_pydict()
    except (pyarrow.ArrowException, ValueError) as error:
        raise BadInput(f"{path}: not a table of {row_type.__name__}: {str(error).splitlines()[0]}") from None
    return [row_type(*values) for values in zip(*columns.values(), strict=True)]


def append_samples(directory: Path, rows: list[SampleRow]) -> Path:
    """Stores rows as the next part-NNNNN.parquet of a directory; returns the new file."""
    return append_rows(directory, rows, SampleRow)


def append_rows(directory: Path, rows: list[Any], row_type: type[Row]) -> Path:
    """`append_samples` for rows of any one type."""
    numbers = [int(path.stem.removeprefix("part-")) for path in _parts(directory)]
    path = directory / f"part-{max(numbers, default=-1) + 1:05d}.parquet"
    write_rows(path, rows, row_type)
    return path


def _parts(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("part-*.parquet") if re.fullmatch(r"part-\d+", path.stem))


def read_samples(directory: Path) -> list[SampleRow]:
    """Every row of every part, in the order they were drawn.

    BadInput names the part that is broken or that holds a (problem, sample index) a second time.
    """
    return read_parts(directory, SampleRow)


def read_rewards(directory: Path) -> list[RewardRow]:
    """The rewards of one model's samples; errors as in `read_samples`."""
    return read_parts(directory, RewardRow)


def read_parts(directory: Path, row_type: type[R]) -> list[R]:
    """Every row of every part of a directory of samples or rewards."""
    rows: list[R] = []
    seen: set[tuple[str, int]] = set()
    for path in _parts(directory):
        for row in _read_rows(path, row_type):
            if (row.problem_id, row.sample_index) in seen:
                raise BadInput(f"{path}: holds sample {row.sample_index} of problem {row.problem_id} a second time")
            seen.add((row.problem_id, row.sample_index))
            rows.append(row)
    return rows


def write_scores(path: Path, rows: list[ScoreRow]) -> None:
    """Stores the verdicts of one model."""
    write_rows(path, rows, ScoreRow)


def read_scores(path: Path) -> list[ScoreRow]:
    """The verdicts of one model, in the order they were stored."""
    rows: list[ScoreRow] = _read_rows(path, ScoreRow)
    return rows
