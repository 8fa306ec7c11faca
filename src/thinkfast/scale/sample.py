"""Draws completions of every problem from one model against the clock, and stores them as they finish.

Rows reach the disk about every two seconds from a thread of their own, so that the engine does not wait for the disk.
A session that is cut off goes on at (problem, sample index) with the clock it had spent, lost work included.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from thinkfast import progress, records
from thinkfast.data.chat import PROMPTS, Prompt, render_prompt
from thinkfast.data.problems import Problem, dump_problems
from thinkfast.data.tokenizer import load_tokenizer
from thinkfast.errors import BadInput
from thinkfast.recipe import SampleSettings
from thinkfast.records import SampleRow
from thinkfast.scale import cluster, endpoints
from thinkfast.scale.adaptive import LiveVotes
from thinkfast.scale.endpoints import Completion

if TYPE_CHECKING:
    from thinkfast.engine.engine import Engine
    from thinkfast.engine.sampling import Sample, SamplingParams
    from thinkfast.model.decoder import Decoder

FLUSH_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a model has drawn: rows, tokens, and the seconds on its clock."""

    samples: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def sample_model(
    model_dir: Path,
    problems: Sequence[Problem],
    settings: SampleSettings,
    out_dir: Path,
    name: str | None = None,
    update: progress.Update = progress.silent,
    prompt: Prompt = PROMPTS["plain"],
    workers: int = 0,
    backend: str = endpoints.AUTO,
    draft: Path | None = None,
) -> Drawn:
    """Draws up to `settings.n` samples a problem within `settings.seconds` of clock into part files of `out_dir`.

    With `settings.stop_error` a problem whose vote is decided gets no further sample, its turns go to the others.
    The clock starts with the first prefill; loading, the choice of slots and grading are outside it. When interrupted,
    everything finished so far is kept and the next call goes on. `update` gets the share that is done, 0 to 1.
    A sample whose logits were not finite is not stored, and drawn again by a call that goes on; run.json counts them.
    prompt: how problems are put; kept in run.json. workers: processes of a Ray cluster; 0 draws in this process.
    backend: "auto" for our engine, or one of `endpoints.open_endpoint`. draft: a model that guesses ahead for it.
    Raises BadInput for an unusable model, one that changes meanwhile, and when `out_dir` holds samples of other
    settings; Failed when no sample at all had finite logits.
    """
    from thinkfast.model.checkpoint import read_config

    read_config(model_dir)
    load_tokenizer(model_dir)
    inputs = {"model": records.hash_path(model_dir, records.MODEL_FILES), "problems": problems_hash(problems)}
    described = settings.model_dump(mode="json", exclude_none=True)
    if prompt != PROMPTS["plain"]:
        described["prompt"] = asdict(prompt)
    if backend != endpoints.AUTO:
        described["backend"] = backend
    if draft is not None:
        read_config(draft)
        inputs["draft"] = records.hash_path(draft, records.MODEL_FILES)
    if (backend != endpoints.AUTO) + bool(workers) + (draft is not None) > 1:
        raise BadInput("a backend, workers and a draft were given, expected one of them")
    if (workers or backend != endpoints.AUTO) and len(settings.slots) != 1:
        raise BadInput(f"slots = {list(settings.slots)}: one number is expected when workers or a backend draw")
    with records.locked(out_dir), records.stage(out_dir, name="sample", settings=described, inputs=inputs) as run:
        drawn = _on_disk(run)
        if not run.done:
            if run.resuming:
                run.note("resumes", [*run.notes.get("resumes", []), {"samples": drawn.samples, "clock": drawn.seconds}])
            given = (update, prompt, workers, backend, draft)
            drawn = _draw(model_dir, problems, settings, run, name or model_dir.name, *given)
    return drawn


def problems_hash(problems: Sequence[Problem]) -> str:
    """Identifies a problem set by its content."""
    return hashlib.sha256(dump_problems(problems).encode()).hexdigest()


def _on_disk(run: records.Stage) -> Drawn:
    """The rows in the stage's directory; the clock is the latest end, or what was spent beyond it (`clock`)."""
    rows = records.read_samples(run.directory)
    latest = max((row.t_end for row in rows), default=0.0)
    return Drawn(len(rows), sum(row.token_count for row in rows), max(latest, float(run.notes.get("clock", 0.0))))


def _draw(
    model_dir: Path,
    problems: Sequence[Problem],
    settings: SampleSettings,
    run: records.Stage,
    name: str,
    update: progress.Update,
    prompt: Prompt,
    workers: int,
    backend: str,
    draft: Path | None,
) -> Drawn:
    from thinkfast.engine.sampling import ERROR, SamplingParams

    tokenizer = load_tokenizer(model_dir)
    prompts = [render_prompt(tokenizer, problem.problem, prompt) for problem in problems]
    params = SamplingParams(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=settings.seed,
    )
    place = {problem.id: index for index, problem in enumerate(problems)}
    before = _on_disk(run)
    held = records.read_samples(run.directory)
    skip = frozenset((place[row.problem_id], row.sample_index) for row in held)
    votes = LiveVotes(len(problems), settings.stop_error) if settings.stop_error else None
    if votes:
        for earlier in held:
            votes.count(place[earlier.problem_id], earlier.text)
    over = votes.over if votes else set()
    tokens = before.tokens

    def text_of(sample: Sample | Completion) -> str:
        return sample.text if isinstance(sample, Completion) else tokenizer.decode(list(sample.token_ids))

    def row(problem: int, index: int, sample: Sample | Completion) -> SampleRow:
        return SampleRow(
            problem_id=problems[problem].id,
            sample_index=index,
            seed=settings.seed,
            text=text_of(sample),
            token_count=_length(sample),
            finish_reason=sample.finish_reason,
            t_start=sample.t_start,
            t_end=sample.t_end,
            logprob_sum=sample.logprob_sum,
            model=name,
        )

    source: AbstractContextManager[cluster.Stream]
    if workers:
        source = cluster.workers(model_dir, prompts, settings.n, params, settings.slots[0], workers, over)
    elif backend != endpoints.AUTO:
        source = endpoints.open_endpoint(backend, model_dir, prompts, settings.n, params, settings.slots[0], over)
    else:
        source = _in_process(model_dir, prompts, params, settings, run, over, draft)
    with source as stream, _Writer(run, row, before.seconds) as writer:
        _check_unchanged(model_dir, run)  # all have read it by now
        finished = stream(skip, before.seconds, settings.seconds)
        failed: Counter[int] = Counter()
        for count, (problem, index, sample) in enumerate(finished, before.samples + 1):
            if sample.finish_reason == ERROR:
                failed[problem] += 1
                continue
            writer.add(problem, index, sample)
            if votes:
                votes.count(problem, text_of(sample))
            tokens += _length(sample)
            share = max(sample.t_end / settings.seconds, count / (settings.n * len(problems)))
            words = f"{count - failed.total()} samples, {tokens / max(sample.t_end, 1e-9):,.0f} tokens/s"
            update(min(share, 1.0), words + (f", {failed.total()} failed: logits not finite" if failed else ""))
    if workers:
        run.note("slots", {"chosen": settings.slots[0]})
        run.note("engine", {"workers": workers, "threads": 1})
    if backend != endpoints.AUTO:
        run.note("slots", {"chosen": settings.slots[0]})
        run.note("engine", {"backend": backend})
    del run.notes["clock"]
    drawn = _on_disk(run)
    if failed:
        run.note("failed", failed.total())
    if failed and not drawn.samples:
        raise records.Failed(f"{model_dir}: the logits of all {failed.total()} samples were not finite")
    counts = Counter(row.problem_id for row in records.read_samples(run.directory))
    if any(counts[p.id] + failed[at] < settings.n for at, p in enumerate(problems) if at not in over):
        # The deadline ended it, perhaps between the last end and a start: no row tells that all of it was spent.
        drawn = replace(drawn, seconds=max(drawn.seconds, settings.seconds))
        run.note("clock", drawn.seconds)
    run.note("drawn", {"samples": drawn.samples, "tokens": drawn.tokens, "seconds": drawn.seconds})
    if votes:
        run.note("stopped", len(over))
    return drawn


def _length(sample: Sample | Completion) -> int:
    return sample.token_count if isinstance(sample, Completion) else len(sample.token_ids)


def _check_unchanged(model_dir: Path, run: records.Stage) -> None:
    """Raises BadInput where the model is not what was hashed when the stage began."""
    if records.hash_path(model_dir, records.MODEL_FILES) != run.record["inputs"]["model"]:
        raise BadInput(f"{model_dir}: changed while it was being read, expected a model that stays as it is")


@contextmanager
def _in_process(
    model_dir: Path,
    prompts: list[list[int]],
    params: SamplingParams,
    settings: SampleSettings,
    run: records.Stage,
    over: Collection[int],
    draft: Path | None,
) -> Iterator[cluster.Stream]:
    """One engine in this process, warm."""
    import torch

    from thinkfast.engine.engine import Engine
    from thinkfast.model.checkpoint import load_model

    model, guesses = load_model(model_dir), None if draft is None else load_model(draft)
    engine = Engine(model, slots=_slots(model, guesses, prompts, params, settings, run), draft=guesses)
    run.note("engine", {"backend": engine.backend, "threads": torch.get_num_threads()})
    _trial(engine, prompts[:1], params, deadline=0.5)
    yield lambda skip, clock, deadline: engine.stream(prompts, settings.n, params, deadline, skip, clock, over)


def _slots(
    model: Decoder,
    draft: Decoder | None,
    prompts: list[list[int]],
    params: SamplingParams,
    settings: SampleSettings,
    run: records.Stage,
) -> int:
    """The number of slots that decodes most tokens a second, measured outside the clock once and kept in run.json."""
    from thinkfast.engine.engine import Engine

    if len(settings.slots) == 1:
        run.note("slots", {"chosen": settings.slots[0]})
    if "slots" not in run.notes:
        rates = {}
        for slots in settings.slots:
            engine = Engine(model, slots=slots, draft=draft)
            _trial(engine, prompts[:1], params, deadline=0.5)
            rates[slots] = _trial(engine, prompts, params, deadline=settings.trial_seconds)
        chosen = max(rates, key=lambda slots: rates[slots])
        measured = {str(slots): round(rate, 1) for slots, rate in rates.items()}
        run.note("slots", {"chosen": chosen, "tokens_per_second": measured, "seconds": settings.trial_seconds})
    return int(run.notes["slots"]["chosen"])


def _trial(engine: Engine, prompts: list[list[int]], params: SamplingParams, deadline: float) -> float:
    """Tokens per second over `deadline` seconds of sampling, completions that were cut off included."""
    started = time.monotonic()
    tokens = sum(len(sample.token_ids) for _, _, sample in engine.stream(prompts, 64, params, deadline))
    return tokens / max(time.monotonic() - started, 1e-9)


class _Writer:
    """Stores finished samples, and the clock they reach, from a thread of its own until the block ends."""

    def __init__(
        self, run: records.Stage, row: Callable[[int, int, Sample | Completion], SampleRow], clock: float
    ) -> None:
        self._run, self._row, self._clock_start = run, row, clock
        self._pending: list[tuple[int, int, Sample | Completion]] = []
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._error: OSError | None = None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._check()

    def add(self, problem: int, index: int, sample: Sample | Completion) -> None:
        """Takes a sample; raises the OSError that stopped the thread, if one did."""
        self._check()
        with self._lock:
            self._pending.append((problem, index, sample))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while not self._stop.wait(FLUSH_SECONDS):
                self._store()
            self._store()
        except OSError as error:
            self._error = error

    def _store(self) -> None:
        with self._lock:
            finished, self._pending = self._pending, []
        if finished:
            records.append_samples(self._run.directory, [self._row(*entry) for entry in finished])
        self._run.note("clock", round(self._clock_start + time.monotonic() - self._started, 3))
