"""The stages that make things: problems, the teacher's copy, the corpus, and students by conversion and training."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfast import progress, records, runtime
from thinkfast.data.problems import Problem, dump_problems, load_problems
from thinkfast.errors import BadInput
from thinkfast.recipe import Problems, Student, Text, Training

if TYPE_CHECKING:
    from torch import Tensor

    from thinkfast.data.corpus import Corpus
    from thinkfast.data.sources import Source
    from thinkfast.data.tokenizer import Tokenizer
    from thinkfast.distill.trainer import Progress, TrainSettings

CALIBRATION_ROWS = 64
TEACHER_FILES = ("*.json", "*.safetensors", "*.jinja", "LICENSE*")
Say = Callable[[str], None]


class Stages:
    """Opens stages, and tells of each in one line with its seconds when it ends."""

    def __init__(self, say: Say) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say

    @contextmanager
    def open(
        self, title: str, directory: Path, *, settings: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> Iterator[records.Stage]:
        """`records.stage` of the title's first word; a stage may note "result", a few words for its line."""
        with records.stage(directory, name=title.split()[0], settings=settings, inputs=inputs) as run:
            yield run
        self.tell(title, run.seconds, str(run.notes.get("result", "")), run.done)

    def tell(self, title: str, seconds: float, result: str, kept: bool) -> None:
        self.seconds[title] = seconds
        self._say(f"{title:<18}{seconds:>8.1f} s  {result}{' (done before)' if kept else ''}")


def teacher_directory(path: str) -> Path:
    """The directory a recipe means; "bundled" is the small teacher that comes with the package."""
    directory = runtime.ASSETS / "teacher" if path == "bundled" else Path(path)
    if not directory.is_dir():
        raise BadInput(f"{directory}: no such model directory")
    return directory


def make_problems(settings: Problems, directory: Path, stages: Stages) -> list[Problem]:
    """The held-out problems: generated, or the first `count` of a file."""
    inputs = {} if settings.path is None else {"problems file": records.hash_path(Path(settings.path))}
    with stages.open("problems", directory, settings=settings.model_dump(mode="json"), inputs=inputs) as run:
        if not run.done:
            problems = load_problems(settings.path) if settings.path else generated(settings, "held-out")
            problems = problems[: settings.count]
            records.write_text(directory / "problems.jsonl", dump_problems(problems))
            run.note("result", f"{len(problems)} problems")
    return load_problems(directory / "problems.jsonl")


def generated(settings: Problems | Text, split: str) -> list[Problem]:
    """Generated word problems of one split, no question twice."""
    from thinkfast.data.wordproblems import generate

    count = settings.count if isinstance(settings, Problems) else settings.problems
    return [
        Problem(made.id, made.problem, made.answer, made.level, made.solution)
        for made in generate(settings.seed, count, split, list(settings.levels))
    ]


def copy_teacher(source: Path, directory: Path, stages: Stages) -> Path:
    """Copies what a stock model directory needs, so that the run stands on its own."""
    from thinkfast.model.checkpoint import read_config

    config = read_config(source)
    inputs = {"teacher": records.hash_path(source, records.MODEL_FILES)}
    with stages.open("teacher", directory, settings={}, inputs=inputs) as run:
        if not run.done:
            for pattern in TEACHER_FILES:
                for file in source.glob(pattern):
                    if file.name != records.RECORD:
                        temporary = directory / f".{file.name}.tmp"
                        shutil.copyfile(file, temporary)
                        temporary.replace(directory / file.name)
            run.note("result", f"{config.num_layers} layers of width {config.hidden_size}")
    return directory


def make_corpus(settings: Text, teacher: Path, directory: Path, stages: Stages) -> Corpus:
    """The training text tokenised for the teacher: problems of the train split with their worked solutions, or what the
    recipe names. A directory that holds a corpus already is read where it is."""
    from thinkfast.data.corpus import Corpus, write_corpus
    from thinkfast.data.sources import mixed
    from thinkfast.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(teacher)
    inputs = {"tokenizer": tokenizer.fingerprint}
    if settings.path is not None and (Path(settings.path) / "corpus.json").exists():
        return _with_held_out(Corpus(settings.path, tokenizer.fingerprint), settings)
    sources = text_sources(settings)
    for source in sources:
        inputs |= {f"corpus file {file}": records.hash_path(file) for file in source.files()}
    if settings.path is not None:
        inputs["corpus file"] = records.hash_path(Path(settings.path))
    with stages.open("corpus", directory, settings=settings.model_dump(mode="json"), inputs=inputs) as run:
        if not run.done:
            counts: list[dict[str, Any]] = []
            documents: Iterable[Sequence[list[int]]]
            if sources:
                documents = mixed(sources, tokenizer, settings.tokens, counts)
            else:
                problems = load_problems(settings.path) if settings.path else generated(settings, "train")
                documents = _documents(problems, tokenizer, settings.path or "the generated problems")
            corpus = write_corpus(directory, documents, tokenizer.fingerprint, tokenizer.vocab_size, counts)
            if counts:
                run.note("sources", counts)
            run.note("result", f"{len(corpus)} documents, {corpus.tokens / 1e6:.2f}M tokens")
    return _with_held_out(Corpus(directory, tokenizer.fingerprint), settings)


def text_sources(settings: Text) -> list[Source]:
    """The sources of a mixture. Raises BadInput for one that is not there."""
    from thinkfast.data.sources import Source, check_sources

    sources = [Source(**source.model_dump()) for source in settings.sources]
    check_sources(sources, settings.tokens)
    return sources


def _with_held_out(corpus: Corpus, settings: Text) -> Corpus:
    if settings.held_out >= len(corpus):
        raise BadInput(f"corpus.held_out {settings.held_out}: expected fewer than the corpus' {len(corpus)} documents")
    return corpus


def _documents(problems: Iterable[Problem], tokenizer: Tokenizer, source: str) -> Iterator[tuple[list[int], list[int]]]:
    from thinkfast.data.chat import render_prompt

    for problem in problems:
        if problem.solution is None:
            raise BadInput(f"{source}: problem {problem.id} has no solution to learn from")
        yield render_prompt(tokenizer, problem.problem), [*tokenizer.encode(problem.solution), tokenizer.eos_id]


def convert_model(teacher_dir: Path, student: Student, data: Path | None, out: Path) -> str:
    """Converts a teacher without training, calibrated on `data` (problems with solutions) where given.

    Returns the plan as text. Raises BadInput as `stage` does, and for layers that the teacher has not got.
    """
    from thinkfast.data.corpus import write_corpus
    from thinkfast.data.tokenizer import load_tokenizer
    from thinkfast.model.checkpoint import load_model, save_model
    from thinkfast.student.convert import convert
    from thinkfast.student.plan import LayerPlan, plan_document, render_plan

    inputs = {"teacher": records.hash_path(teacher_dir, records.MODEL_FILES)}
    if data is not None:
        inputs["data"] = records.hash_path(data)
    teacher, tokenizer = load_model(teacher_dir), load_tokenizer(teacher_dir)
    plan = LayerPlan(student.attention, student.init)
    document = plan_document(plan, teacher.config, calibrated=data is not None)
    settings = {"attention": list(student.attention), "init": student.init}
    with records.stage(out, name="convert", settings=settings, inputs=inputs, seed=student.seed) as run:
        if not run.done:
            ids = None
            if data is not None:
                documents = _documents(load_problems(data), tokenizer, str(data))
                with tempfile.TemporaryDirectory() as folder:
                    ids = calibration_ids(write_corpus(folder, documents, tokenizer.fingerprint, tokenizer.vocab_size))
            save_model(convert(teacher, plan, ids, student.seed), out, tokenizer_from=teacher_dir)
            records.write_json(out / "plan.json", document)
    return render_plan(document)


def make_student(
    student: Student, teacher_dir: Path, corpus: Corpus, held_out: int, directory: Path, stages: Stages
) -> None:
    """Converts, aligns and distils one student; its directory is a stock checkpoint from the conversion on.

    Goes on from the last saved training state. Raises Failed when training diverges.
    """
    from thinkfast.distill.align import align
    from thinkfast.distill.losses import Loss
    from thinkfast.distill.trainer import Diverged, distill, evaluate_kl
    from thinkfast.model.checkpoint import load_model, save_model
    from thinkfast.student.convert import convert
    from thinkfast.student.plan import LayerPlan, plan_document

    inputs = {"teacher": records.hash_path(teacher_dir, records.MODEL_FILES), "corpus": corpus.identity}
    settings = {**student.model_dump(mode="json"), "held_out": held_out}
    with stages.open(f"student {student.name}", directory, settings=settings, inputs=inputs) as run:
        if run.done:
            return
        teacher = load_model(teacher_dir)
        plan = LayerPlan(student.attention, student.init)
        training, unseen = corpus.slice(0, len(corpus) - held_out), corpus.slice(len(corpus) - held_out, len(corpus))
        records.write_json(directory / "plan.json", plan_document(plan, teacher.config, calibrated=True))
        model = convert(teacher, plan, calibration_ids(training), student.seed)
        if not run.resuming:
            save_model(model, directory, tokenizer_from=teacher_dir)
        try:
            if student.align.tokens:
                with progress.bar(f"{student.name}: align", student.align.tokens) as update:
                    errors = align(teacher, model, training, _training(student.align), directory, _shown(update))
                run.note("align_error", {str(layer): round(error, 5) for layer, error in errors.items()})
            if student.distill.tokens:
                loss = Loss(student.distill.loss, temperature=student.distill.temperature)
                with progress.bar(f"{student.name}: distill", student.distill.tokens) as update:
                    distill(teacher, model, training, _training(student.distill), directory, loss, _shown(update))
        except Diverged as error:
            raise records.Failed(f"{directory}: {error}") from None
        run.note("kl", evaluate_kl(teacher, model, unseen))
        save_model(model, directory, tokenizer_from=teacher_dir)
        run.note("train", _last_rows(directory / "metrics.jsonl"))
        run.note("result", f"KL {run.notes['kl']:.4f} nats a token on text it was not trained on")
    for state in directory.glob("*.state"):
        state.unlink()


def _training(settings: Training) -> TrainSettings:
    from thinkfast.distill.trainer import TrainSettings

    return TrainSettings(
        tokens=settings.tokens,
        lr=settings.lr,
        batch_tokens=settings.batch_tokens,
        warmup=settings.warmup,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        schedule=settings.schedule,
        seed=settings.seed,
        row_tokens=settings.row_tokens,
    )


def _shown(update: progress.Update) -> Progress:
    def show(step: int, tokens: int, total: int, loss: float) -> None:
        update(min(tokens, total), f"step {step}, loss {loss:.4f}")

    return show


def calibration_ids(corpus: Corpus) -> Tensor:
    """Token ids (rows, length) of long documents, cut to the shortest of them so that nothing is padded."""
    longest = corpus.lengths.argsort(kind="stable")[-CALIBRATION_ROWS:]
    return corpus.collate(longest).input_ids[:, : int(corpus.lengths[longest].min())]


def _last_rows(metrics: Path) -> dict[str, dict[str, float]]:
    """Tokens and seconds at the end of every training stage."""
    last: dict[str, dict[str, float]] = {}
    if metrics.exists():
        for line in metrics.read_text().splitlines():
            row = json.loads(line)
            last[row["stage"]] = {"tokens": row["tokens"], "seconds": row["seconds"]}
    return last
