"""The stages that make things: problems, the teacher's copy, the corpus, and students by conversion alone."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfast import progress, ranks, records, runtime
from thinkfast.data.problems import Problem, dump_problems, load_problems
from thinkfast.errors import BadInput
from thinkfast.recipe import Problems, Text
from thinkfast.sections import Student

if TYPE_CHECKING:
    from torch import Tensor

    from thinkfast.data.corpus import Corpus
    from thinkfast.data.sources import Source
    from thinkfast.data.tokenizer import Tokenizer
    from thinkfast.student.plan import LayerPlan

CALIBRATION_ROWS = 64
TOGETHER = ("student", "base")
TEACHER_FILES = ("*.json", "*.safetensors", "*.jinja", "LICENSE*")
Say = Callable[[str], None]


class _Told(records.Stage):
    """A stage on a process that is not the first: it keeps no record."""

    def save(self) -> None:
        pass


class Stages:
    """Opens stages, and tells of each in one line with its seconds when it ends."""

    def __init__(self, say: Say) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say

    @contextmanager
    def open(
        self, title: str, directory: Path, *, settings: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> Iterator[records.Stage]:
        """`records.stage` of the title's first word; a stage may note "result", a few words for its line.

        Of several processes the first one opens it and tells the others; all leave it together.
        """
        team, name = ranks.current(), title.split()[0]
        if team.rank:
            done, record = team.agree(None)
            # What all train together is done by all of them; everything else is the first one's work.
            yield _Told(directory, record, done or name not in TOGETHER, resuming=True)
            team.wait()
            return
        with records.stage(directory, name=name, settings=settings, inputs=inputs) as run:
            team.agree((run.done, run.record))
            yield run
        team.wait()
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


def check_tokenizer(teacher_dir: Path, say: Say) -> None:
    """Refuses a tokenizer with more tokens than the teacher, and says where there is nothing to pad with."""
    from thinkfast.data.tokenizer import load_tokenizer
    from thinkfast.model.checkpoint import read_config

    tokenizer, known = load_tokenizer(teacher_dir), read_config(teacher_dir).vocab_size
    if tokenizer.vocab_size > known:
        raise BadInput(
            f"{teacher_dir}: the tokenizer has {tokenizer.vocab_size} tokens and the model {known}, expected no more"
        )
    if tokenizer.pad_id == tokenizer.eos_id:
        say(f"{teacher_dir}: no pad token; rows are padded by length, and the end of a text is learnt all the same")


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
    from thinkfast.data.corpus import Corpus
    from thinkfast.data.sources import mixed
    from thinkfast.data.tokenizer import load_tokenizer
    from thinkfast.data.writer import write_documents

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

            def documents(done: int) -> Iterable[Sequence[list[int]]]:
                if sources:
                    return _shown(mixed(sources, tokenizer, settings.tokens, counts), counts, settings.tokens)
                problems = load_problems(settings.path) if settings.path else generated(settings, "train")
                return _documents(problems[done:], tokenizer, settings.path or "the generated problems")

            write_documents(directory, documents, tokenizer.fingerprint, tokenizer.vocab_size, counts)
            corpus = Corpus(directory)
            if counts:
                run.note("sources", counts)
            run.note("result", f"{len(corpus)} documents, {corpus.tokens / 1e6:.2f}M tokens")
    return _with_held_out(Corpus(directory, tokenizer.fingerprint), settings)


def _shown(
    documents: Iterable[Sequence[list[int]]], counts: list[dict[str, Any]], tokens: int | None
) -> Iterator[Sequence[list[int]]]:
    """The same documents, with a bar where it is known how many tokens there will be."""
    if tokens is None:
        yield from documents
        return
    with progress.bar("corpus", tokens) as update:
        for document in documents:
            made = sum(count["tokens"] for count in counts)
            update(min(made, tokens), f"{made:,} tokens")
            yield document


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
        if problem.solution is None or not problem.solution.strip():
            raise BadInput(f"{source}: problem {problem.id} has no solution to learn from")
        yield render_prompt(tokenizer, problem.problem), [*tokenizer.encode(problem.solution), tokenizer.eos_id]


def layer_plan(student: Student) -> LayerPlan:
    """The layers a student keeps, out of its ranking where it has one."""
    from thinkfast.student.plan import LayerPlan, ranked_layers

    attention = student.attention
    if student.ranking is not None and student.keep is not None:
        attention = ranked_layers(records.read_json(Path(student.ranking)), student.keep, student.ranking)
    return LayerPlan(attention, student.init, mixer=student.mixer)


def ranking_input(student: Student) -> dict[str, str]:
    """The hash of a student's ranking, an input of the stage that makes it."""
    return {} if student.ranking is None else {"ranking": records.hash_path(Path(student.ranking))}


def convert_model(teacher_dir: Path, student: Student, data: Path | None, out: Path) -> str:
    """Converts a teacher without training, calibrated on `data` (problems with solutions) where given.

    Returns the plan as text. Raises BadInput as `stage` does, and for layers that the teacher has not got.
    """
    from thinkfast.data.corpus import write_corpus
    from thinkfast.data.tokenizer import load_tokenizer
    from thinkfast.model.checkpoint import load_model, save_own
    from thinkfast.student.convert import convert
    from thinkfast.student.plan import plan_document, render_plan

    inputs = {"teacher": records.hash_path(teacher_dir, records.MODEL_FILES), **ranking_input(student)}
    if data is not None:
        inputs["data"] = records.hash_path(data)
    teacher, tokenizer = load_model(teacher_dir), load_tokenizer(teacher_dir)
    plan = layer_plan(student)
    document = plan_document(plan, teacher.config, calibrated=data is not None)
    settings = {"attention": list(plan.attention), "init": student.init, "mixer": student.mixer}
    with records.stage(out, name="convert", settings=settings, inputs=inputs, seed=student.seed) as run:
        if not run.done:
            ids = None
            if data is not None:
                documents = _documents(load_problems(data), tokenizer, str(data))
                with tempfile.TemporaryDirectory() as folder:
                    ids = calibration_ids(write_corpus(folder, documents, tokenizer.fingerprint, tokenizer.vocab_size))
            save_own(convert(teacher, plan, ids, student.seed), out, tokenizer_from=teacher_dir)
            records.write_json(out / "plan.json", document)
    return render_plan(document)


def calibration_ids(corpus: Corpus) -> Tensor:
    """Token ids (rows, length) of long documents, cut to the shortest of them so that nothing is padded."""
    longest = corpus.lengths.argsort(kind="stable")[-CALIBRATION_ROWS:]
    return corpus.collate(longest).input_ids[:, : int(corpus.lengths[longest].min())]
