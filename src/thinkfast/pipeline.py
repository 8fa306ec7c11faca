"""A recipe's stages in order, each in its own directory, skipping what is done and going on with what is half done."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from thinkfast import progress, ranks, records, results, runtime
from thinkfast.data.chat import PROMPTS, Prompt, named_prompt
from thinkfast.data.problems import Problem, refuse
from thinkfast.data.sets import open_problems
from thinkfast.errors import BadInput
from thinkfast.recipe import TEACHER, Bench, Recipe, SampleSettings, Teacher, Text, dump_recipe, load_recipe
from thinkfast.sections import Compute, Student, Watching
from thinkfast.stages import (
    Say,
    Stages,
    check_tokenizer,
    copy_teacher,
    layer_plan,
    make_corpus,
    make_problems,
    teacher_directory,
    text_sources,
)
from thinkfast.students import check_students, make_base, make_student

UNWATCHED, ON_ONE = Watching(answers=0), Compute()


def run_file(path: Path, out: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Runs a recipe file, by default under `runs/` and its name, and prints its summary."""
    recipe = load_recipe(path, overrides)
    summary = run_recipe(recipe, out or Path("runs") / path.stem, lambda line: print(line, flush=True))
    results.print_summary(summary, recipe.compare.baseline)
    return summary


def run_recipe(recipe: Recipe, out: Path, say: Say = print) -> dict[str, Any]:
    """Runs every stage of `recipe` under `out` and returns the document of `summary.json`.

    `say` gets one line a stage. Raises BadInput when `out` holds results of other settings, naming the first one;
    Failed when a stage cannot go on.
    """
    source = teacher_directory(recipe.teacher.path)
    _require_files(recipe.problems.path, recipe.corpus.path, *(student.ranking for student in recipe.student))
    text_sources(recipe.corpus)
    with records.locked(out):
        if not (out / "recipe.toml").exists():
            records.write_text(out / "recipe.toml", dump_recipe(recipe))
        stages = Stages(say)
        problems = make_problems(recipe.problems, out / "problems", stages)
        teacher = copy_teacher(source, out / "models" / TEACHER, stages)
        check_fit(recipe, teacher, problems)
        corpus = make_corpus(recipe.corpus, teacher, out / "corpus", stages)
        check_students(recipe, teacher, corpus)
        base = None
        if recipe.base is not None:
            base = make_base(recipe.base, teacher, corpus, recipe.corpus.held_out, out / "base", stages, recipe.watch)
        for student in recipe.student:
            place = out / "models" / student.name
            make_student(student, teacher, corpus, recipe.corpus.held_out, place, stages, recipe.watch, base)
        for name in recipe.models:
            _sample(recipe, name, problems, out, stages)
        _bench(recipe, out, stages)
        _grade(recipe, problems, out, stages)
        _compare(recipe, problems, out, stages)
        records.write_json(out / "summary.json", results.summary(recipe.models, problems, out, stages.seconds))
        _report(recipe, out, stages)
        summary = results.summary(recipe.models, problems, out, stages.seconds)
        records.write_json(out / "summary.json", summary)
        records.write_text(out / "recipe.toml", dump_recipe(recipe))
    return summary


def _require_files(*paths: str | None) -> None:
    """Refuses missing files before anything is written."""
    for path in paths:
        if path is not None and not Path(path).is_file() and not (Path(path) / "corpus.json").is_file():
            raise BadInput(f"{path}: no such file")


def check_fit(recipe: Recipe, teacher: Path, problems: list[Problem]) -> None:
    """Refuses, before anything long begins, students that the teacher cannot become and prompts that leave no room."""
    from thinkfast.data.chat import render_prompt
    from thinkfast.data.tokenizer import load_tokenizer
    from thinkfast.model.checkpoint import read_config

    config, tokenizer = read_config(teacher), load_tokenizer(teacher)
    for student in recipe.student:
        try:
            layer_plan(student).student_config(config)
        except BadInput as error:
            raise BadInput(f"student {student.name}: {error}") from None
    longest = max(len(render_prompt(tokenizer, problem.problem)) for problem in problems)
    room = config.max_position_embeddings - longest
    if recipe.sample.max_tokens > room:
        raise BadInput(f"sample.max_tokens {recipe.sample.max_tokens}: the longest prompt leaves room for {room}")


def distill_model(
    teacher: Path,
    text: Text,
    student: Student,
    out: Path,
    say: Say = print,
    watch: Watching = UNWATCHED,
    compute: Compute = ON_ONE,
) -> dict[str, Any]:
    """Makes one student of a teacher from a file of problems with solutions: `out/corpus`, then `out/<its name>`.

    Returns what the student's run.json notes: the KL divergence, alignment errors, tokens and seconds.
    """
    from thinkfast import forecast

    teacher_dir = teacher_directory(str(teacher))
    _require_files(text.path)
    text_sources(text)
    recipe = Recipe(teacher=Teacher(path=str(teacher)), corpus=text, student=(student,), compute=compute)
    with _alone_or_together(out, say) as stages:
        check_tokenizer(teacher_dir, lambda line: print(line, file=sys.stderr))
        forecast.check_here(recipe)
        corpus = make_corpus(text, teacher_dir, out / "corpus", stages)
        check_students(recipe, teacher_dir, corpus)
        make_student(student, teacher_dir, corpus, text.held_out, out / student.name, stages, watch, compute=compute)
    notes: dict[str, Any] = (records.read_record(out / student.name) or {})["notes"]
    return notes


def distill_recipe(path: Path, out: Path | None, overrides: Sequence[str], gpus: str | None) -> dict[str, Any]:
    """Makes all students of a recipe, on as many processes as torchrun started; nothing is sampled.

    With `gpus` it only tells what that takes. Returns the plan, or what the students' run.json note.
    """
    from thinkfast import forecast

    recipe = load_recipe(path, overrides)
    if gpus is not None:
        return forecast.tell_plan(recipe, gpus)
    return distill_students(recipe, out or Path("runs") / path.stem)


def distill_students(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Makes all students of a recipe: `out/corpus`, `out/base`, then `out/models/<name>` each."""
    from thinkfast import forecast

    _require_files(recipe.corpus.path, *(student.ranking for student in recipe.student))
    text_sources(recipe.corpus)
    teacher_dir, held_out = teacher_directory(recipe.teacher.path), recipe.corpus.held_out
    watch, how = recipe.watch, recipe.compute
    with _alone_or_together(out, print) as stages:
        check_tokenizer(teacher_dir, lambda line: print(line, file=sys.stderr))
        forecast.check_here(recipe)
        corpus, base = make_corpus(recipe.corpus, teacher_dir, out / "corpus", stages), None
        check_students(recipe, teacher_dir, corpus)
        if recipe.base is not None:
            base = make_base(recipe.base, teacher_dir, corpus, held_out, out / "base", stages, watch, how)
        for student in recipe.student:
            place = out / "models" / student.name
            make_student(student, teacher_dir, corpus, held_out, place, stages, watch, base, how)
    names = [student.name for student in recipe.student]
    return {name: (records.read_record(out / "models" / name) or {})["notes"] for name in names}


def plan_recipe(recipe: Recipe, teacher: Path, gpus: str) -> dict[str, Any]:
    """Tells what a recipe takes with another teacher."""
    from thinkfast import forecast

    return forecast.tell_plan(recipe.model_copy(update={"teacher": Teacher(path=str(teacher))}), gpus)


@contextmanager
def _alone_or_together(out: Path, say: Say) -> Iterator[Stages]:
    """Stages in `out` by this process, or by all that torchrun started; the first of them holds the directory."""
    with ranks.gathered() as team:
        if team.rank:
            yield Stages(lambda line: None)
            return
        with records.locked(out):
            yield Stages(say)


def _sample(recipe: Recipe, name: str, problems: list[Problem], out: Path, stages: Stages) -> None:
    from thinkfast.scale.sample import sample_model

    directory = out / "samples" / name
    kept = (records.read_record(directory) or {}).get("status") == "complete"
    with progress.bar(f"{name}: sample", 1.0) as update:
        drawn = sample_model(out / "models" / name, problems, recipe.sample, directory, name, update)
    seconds = (records.read_record(directory) or {}).get("seconds", 0.0)
    told = f"{drawn.samples / len(problems):.1f} samples a problem, {drawn.tokens_per_second:,.0f} tokens/s"
    stages.tell(f"sample {name}", seconds, told, kept)


def read_prompt(name: str, shots: int, source: str | None) -> Prompt:
    """A named prompt with the first solved problems of a set before each problem."""
    if shots and source is None:
        raise BadInput(f"--shots {shots}: --shots-from says where they come from")
    solved = [(p.problem, p.solution) for p in open_problems(source or "")] if shots else []
    return named_prompt(name, [(text, solution) for text, solution in solved if solution], shots)


def sample_files(
    models: Sequence[Path],
    problems: str,
    settings: SampleSettings,
    out: Path,
    prompt: Prompt = PROMPTS["plain"],
    workers: int = 0,
    skip_bad: bool = False,
    answers: bool = True,
    backend: str = "auto",
    draft: Path | None = None,
) -> dict[str, Any]:
    """Samples models, one after the other, on a set and tells how much came of each; several get `out/<name>`.

    answers: False for prompts that have no right answer.
    """
    from thinkfast.scale.sample import sample_model

    told: dict[str, Any] = {}
    directories = {path.resolve().name: path for path in (teacher_directory(str(model)) for model in models)}
    if len(directories) < len(models):
        raise BadInput(f"{', '.join(map(str, models))}: two models have one name")
    complain = (lambda line: print(line, file=sys.stderr)) if skip_bad else refuse
    asked = open_problems(problems, complain, answers)
    for name, directory in directories.items():
        place = out / name if len(models) > 1 else out
        with progress.bar(f"{name}: sample", 1.0) as update:
            guesses = None if draft is None else teacher_directory(str(draft))
            given = (update, prompt, workers, backend, guesses)
            drawn = sample_model(directory, asked, settings, place, None, *given)
        words = f"{drawn.samples:,} samples in {drawn.seconds:.1f} s of clock, {drawn.tokens_per_second:,.0f} tokens/s"
        print(words if len(models) == 1 else f"{name}: {words}")
        told[name] = {**asdict(drawn), "tokens_per_second": drawn.tokens_per_second}
    return told if len(models) > 1 else next(iter(told.values()))


def bench_models(models: Sequence[Path], settings: Bench) -> dict[str, Any]:
    """Decoded tokens per second of stock models, each called by its directory; every model of a run directory."""
    from thinkfast.bench.decode import decode_speeds
    from thinkfast.bench.shapes import PREFIX, random_model
    from thinkfast.model.checkpoint import load_model

    found: dict[str, Path | str] = {}
    for path in models:
        if str(path).startswith(PREFIX):
            found[str(path).removeprefix(PREFIX)] = str(path)
            continue
        inside = sorted((path / "models").glob("*/config.json"))
        for directory in [config.parent for config in inside] or [teacher_directory(str(path))]:
            if directory.name in found:
                raise BadInput(f"{directory}: two models are called {directory.name!r}")
            found[directory.name] = directory
    loaded = {n: random_model(place) if isinstance(place, str) else load_model(place) for n, place in found.items()}
    return dict(
        decode_speeds(
            loaded,
            settings.batches,
            settings.contexts,
            backend=settings.backends,
            shared=settings.shared,
            prompts=settings.prompts,
        )
    )


def bench_file(models: Sequence[Path], settings: Bench, out: Path | None) -> dict[str, Any]:
    """`bench_models`, told as a table and stored in `out` where given, with a figure beside it."""
    document = {"command": runtime.command(), **bench_models(models, settings)}
    wide = max([12, *(len(row["model"]) for row in document["rows"] + document["prefill"])])
    for row in document["rows"]:
        place = f"{row['model']:<{wide}} batch {row['batch']:>4}  context {row['context']:>5}"
        place += f" ({row['shared']} shared)" if row["shared"] else ""
        print(f"{place}  {row['tokens_per_second']:>9,.0f} tokens/s  {row['share']:>4.0%} of the machine's limit")
    for row in document["prefill"]:
        place = f"{row['model']:<{wide}} {row['prompts']:>3} prompts of {row['length']:>5}"
        print(f"{place}  {row['tokens_per_second']:>9,.0f} tokens/s  {row['share']:>4.0%} of the machine's limit")
    if out is not None:
        from thinkfast.bench.figure import draw_speeds

        records.write_json(out, document)
        draw_speeds(document, out.with_suffix(".png"))
    return document


def _bench(recipe: Recipe, out: Path, stages: Stages) -> None:
    if not recipe.bench.batches:
        return
    inputs = {name: records.hash_path(out / "models" / name, records.MODEL_FILES) for name in recipe.models}
    with stages.open("bench", out / "bench", settings=recipe.bench.model_dump(mode="json"), inputs=inputs) as run:
        if not run.done:
            document = bench_models([out / "models" / name for name in recipe.models], recipe.bench)
            records.write_json(out / "bench.json", {"command": runtime.command(), **document})
            run.note("result", f"{len(document['rows'])} speeds")


def _grade(recipe: Recipe, problems: list[Problem], out: Path, stages: Stages) -> None:
    inputs = {name: records.hash_path(out / "samples" / name, ("part-*.parquet",)) for name in recipe.models}
    with stages.open("grade", out / "scores", settings={}, inputs=inputs) as run:
        if not run.done:
            for name in recipe.models:
                rows = results.grade(records.read_samples(out / "samples" / name), problems)
                records.write_scores(out / "scores" / f"{name}.parquet", rows)
            run.note("result", "every answer compared with the right one")


def _compare(recipe: Recipe, problems: list[Problem], out: Path, stages: Stages) -> None:
    settings = recipe.compare.model_dump(mode="json")
    inputs = {name: records.hash_path(out / "scores" / f"{name}.parquet") for name in recipe.models}
    for name in recipe.models:
        if (out / "rewards" / name).exists():
            inputs[f"rewards of {name}"] = records.hash_path(out / "rewards" / name, ("*.parquet",))
    with stages.open("compare", out / "curves", settings=settings, inputs=inputs) as run:
        if not run.done:
            graded = {name: results.read_graded(out, name) for name in recipe.models}
            document = results.compare(graded, problems, recipe.compare)
            records.write_json(out / "curves" / "curves.json", document)
            run.note("result", f"{len(document['wins'])} ranges in which a student is ahead")


def _report(recipe: Recipe, out: Path, stages: Stages) -> None:
    from thinkfast.report.page import write_report

    inputs = {"curves": records.hash_path(out / "curves" / "curves.json")}
    if (out / "bench.json").exists():
        inputs["speeds"] = records.hash_path(out / "bench.json")
    with stages.open("report", out / "report", settings=recipe.report.model_dump(mode="json"), inputs=inputs) as run:
        if not run.done:
            page = write_report(out, out / "report", recipe.report.problems)
            run.note("result", str(page))
