"""The command line: one function a command, each of which calls one function of the package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from thinkfast import __version__, spending_cli
from thinkfast.errors import BadInput, line_of
from thinkfast.options import (
    Attention,
    Init,
    Json,
    Model,
    OpenEnded,
    Out,
    Overrides,
    ProblemsFile,
    Reward,
    Rewards,
    Seed,
    Source,
    Sources,
    finish,
    numbers,
)

app = typer.Typer(
    name="thinkfast",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(spending_cli.app)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything, to see it work.")] = False,
    out: Out = None,
    overrides: Overrides = None,
    json_: Json = False,
) -> None:
    """Distil the bundled teacher, sample, grade and compare: a whole run on this machine."""
    from thinkfast import pipeline, runtime

    recipe = runtime.ASSETS / "recipes" / ("demo-quick.toml" if quick else "demo.toml")
    finish(pipeline.run_file(recipe, out, overrides or []), json_)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A TOML file; recipes/demo.toml is one.")],
    out: Out = None,
    overrides: Overrides = None,
    json_: Json = False,
) -> None:
    """Run every stage of a recipe; what is done is skipped, what is half done goes on."""
    from thinkfast import pipeline

    finish(pipeline.run_file(recipe, out, overrides or []), json_)


@app.command()
def convert(
    teacher: Model,
    out: Annotated[Path, typer.Argument(help="The student's directory.")],
    attention: Attention = "",
    init: Init = "attention",
    data: Annotated[Path | None, typer.Option(help="Problems with solutions, to calibrate the new layers on.")] = None,
    seed: Seed = 0,
) -> None:
    """Turn a teacher into an untrained student and show where every tensor comes from."""
    from thinkfast import stages
    from thinkfast.recipe import section
    from thinkfast.sections import Student

    student = section(Student, {"name": "student", "attention": numbers(attention), "init": init, "seed": seed})
    print(stages.convert_model(stages.teacher_directory(str(teacher)), student, data, out))


@app.command()
def distill(
    teacher: Annotated[Path, typer.Argument(help="A stock model directory, 'bundled', or a recipe (TOML) for all.")],
    data: Annotated[Path | None, typer.Argument(help="Rows with problem, answer and solution, or a corpus.")] = None,
    out: Annotated[Path | None, typer.Argument(help="A directory: the corpus and the student go there.")] = None,
    attention: Attention = "",
    overrides: Overrides = None,
    plan: Annotated[str | None, typer.Option(metavar="GPUS", help="Only tell what it takes, on e.g. 8xH100.")] = None,
    json_: Json = False,
) -> None:
    """Convert, align and distil one student of a teacher (TEACHER DATA OUT), or those of a recipe (RECIPE [OUT]).

    --set takes a recipe's keys: align.*, distill.*, corpus.*, student.0.*. Under torchrun on all of its processes.
    """
    from thinkfast import pipeline
    from thinkfast.recipe import with_overrides

    if teacher.suffix == ".toml":
        finish(pipeline.distill_recipe(teacher, data, overrides or [], plan), json_)
        return
    if data is None or out is None:
        raise BadInput(f"distill {teacher}: expected TEACHER DATA OUT, or a recipe that ends in .toml")
    raw = {"student": [{"name": "student", "attention": numbers(attention)}], "corpus": {"path": str(data)}}
    recipe = with_overrides(raw, "distill", overrides or [])
    if plan is not None:
        finish(pipeline.plan_recipe(recipe, teacher, plan), json_)
        return
    watch, compute = recipe.watch, recipe.compute
    finish(pipeline.distill_model(teacher, recipe.corpus, recipe.student[0], out, print, watch, compute), json_)


@app.command(name="rank-layers")
def rank_layers(
    recipe: Annotated[Path, typer.Argument(help="A TOML file: its teacher, corpus, base and distillation.")],
    out: Annotated[Path, typer.Argument(help="A directory: ranking.json and what it was measured on go there.")],
    method: Annotated[str, typer.Option(help="uniform, kl, kl-trained or answers.")] = "kl",
    overrides: Overrides = None,
    json_: Json = False,
) -> None:
    """Rank which layers should stay attention; students read it with ranking = ".../ranking.json" and keep = 1."""
    from thinkfast import ranking
    from thinkfast.recipe import load_recipe

    document = ranking.rank_layers(load_recipe(recipe, overrides or []), method, out)
    for keep, layers in document["choices"].items():
        print(f"keep {keep}: layers {', '.join(map(str, layers))}")
    finish(document, json_)


@app.command()
def sample(
    models: Annotated[list[Path], typer.Argument(help="Stock model directories, or 'bundled'; one after the other.")],
    problems: Annotated[str, typer.Argument(help="A set by name, or JSONL or Parquet rows with problem and answer.")],
    out: Annotated[Path, typer.Argument(help="A directory for the samples; of several models a directory each in it.")],
    n: Annotated[int, typer.Option(help="Samples a problem, at most.")] = 64,
    seconds: Annotated[float, typer.Option(help="Seconds of clock, for all problems together.")] = 60.0,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    max_tokens: int = 512,
    slots: Annotated[str, typer.Option(help="Completions decoded at once; of several the fastest.")] = "128",
    prompt: Annotated[str, typer.Option(help="plain, boxed, hash or system-boxed.")] = "plain",
    shots: Annotated[int, typer.Option(min=0, help="Solved problems before each problem.")] = 0,
    shots_from: Annotated[str | None, typer.Option(help="Where they come from: a set with solutions.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Report bad rows and go on without them.")] = False,
    open_ended: OpenEnded = False,
    stop_error: Annotated[
        float | None, typer.Option(help="A vote decided with this error ends its problem's sampling, e.g. 0.1.")
    ] = None,
    ray: Annotated[int, typer.Option(min=0, help="Workers on a Ray cluster; 0 needs no Ray.")] = 0,
    backend: Annotated[
        str, typer.Option(help="auto, transformers, vllm, or an OpenAI-style http://… address.")
    ] = "auto",
    draft: Annotated[Path | None, typer.Option(help="A small model that guesses ahead, for few slots.")] = None,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Draw completions in rounds until the clock or the count ends it; goes on where it was cut off."""
    from thinkfast import pipeline
    from thinkfast.recipe import SampleSettings, section

    values: dict[str, Any] = {"n": n, "seconds": seconds, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    values |= {"max_tokens": max_tokens, "slots": numbers(slots), "stop_error": stop_error, "seed": seed}
    settings = section(SampleSettings, values)
    asked = pipeline.read_prompt(prompt, shots, shots_from)
    given = (asked, ray, skip_bad, not open_ended, backend, draft)
    finish(pipeline.sample_files(models, problems, settings, out, *given), json_)


@app.command()
def grade(
    source: Source,
    problems: ProblemsFile = None,
    out: Annotated[Path | None, typer.Option(help="A Parquet file for the verdicts.")] = None,
    json_: Json = False,
) -> None:
    """Compare every answer with the right one."""
    from thinkfast import results

    shares = results.grade_source(source, problems, out)
    print(", ".join(f"{key} {value:.4g}" for key, value in shares.items()))
    finish(shares, json_)


@app.command()
def compare(
    sources: Sources,
    problems: ProblemsFile = None,
    baseline: Annotated[str | None, typer.Option(help="Whom to compare with, by default the first.")] = None,
    out: Annotated[Path | None, typer.Option(help="A file for the curves, like curves.json.")] = None,
    ks: Annotated[str, typer.Option(help="Samples a problem.")] = "1,2,4,8,16,32,64",
    first: Annotated[float, typer.Option("--from", help="First seconds a problem.")] = 0.01,
    last: Annotated[float, typer.Option("--to", help="Last seconds a problem.")] = 0.2,
    points: Annotated[int, typer.Option(help="Points between them.")] = 40,
    rewards: Rewards = None,
    price: Annotated[float | None, typer.Option(help="Dollars an hour: budgets in dollars as well.")] = None,
    count: Annotated[list[str] | None, typer.Option(help="grading, rewards: their seconds are in the clock.")] = None,
    open_ended: OpenEnded = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Coverage and majority against samples and, where timed, against seconds; who leads at which budget."""
    from thinkfast import results, spending
    from thinkfast.recipe import Compare, section

    values = {"baseline": baseline or results.source_name(sources[0]), "ks": numbers(ks), "seed": seed}
    settings = section(Compare, values | {"grid": {"first": first, "last": last, "points": points}})
    compare_them = spending.compare_rewards if open_ended else spending.compare_sources
    document = compare_them(sources, problems, settings, out, rewards or [], price, count or [])
    print("\n".join(spending.in_words(document)))
    finish(document, json_)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/demo.")],
    out: Annotated[Path | None, typer.Option(help="Where the page goes, by default RUN/report.")] = None,
    shown: Annotated[int, typer.Option(min=1, help="Problems shown with their completions.")] = 60,
) -> None:
    """Write the page and the figures of a run again."""
    from thinkfast.report.page import write_report

    print(write_report(run_dir, out or run_dir / "report", shown))


@app.command()
def bench(
    models: Annotated[
        list[Path],
        typer.Argument(help="Model or run directories, 'bundled', or shapes such as random:smollm2-135m-pure."),
    ],
    batches: Annotated[str, typer.Option(help="Completions decoded at once.")] = "1,16,128",
    contexts: Annotated[str, typer.Option(help="Tokens behind each of them.")] = "64,256,1000",
    backends: Annotated[str, typer.Option(help="Of auto, native, torch, transformers, llama.cpp.")] = "auto",
    shared: Annotated[str, typer.Option(help="How many of those tokens are one prompt for all.")] = "0",
    prompts: Annotated[str, typer.Option(help="Lengths of prompts to feed, none by default.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="A file for the document; RUN/bench.json goes into RUN's report.")
    ] = None,
    json_: Json = False,
) -> None:
    """Measure decoded tokens per second, and how near that is to what the machine can do."""
    from thinkfast import pipeline
    from thinkfast.recipe import Bench, section

    asked = {"batches": batches, "contexts": contexts, "shared": shared, "prompts": prompts}
    given = {name: numbers(text) if text else () for name, text in asked.items()}
    settings = section(Bench, {**given, "backends": tuple(backends.split(","))})
    finish(pipeline.bench_file(models, settings, out), json_)


@app.command()
def export(
    model: Model,
    out: Annotated[Path | None, typer.Argument(help="A new directory, or a new file for gguf.")] = None,
    form: Annotated[str, typer.Option("--format", help="'hf' for a Hugging Face directory, 'gguf' for a file.")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16; with gguf also q8_0.")] = None,
    compat: Annotated[bool, typer.Option("--compat", help="Only what older transformers read right as well.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Tell what serving it takes in memory; write nothing.")] = False,
    json_: Json = False,
) -> None:
    """Write a model as a stock checkpoint that other engines run, checked before it gets its name."""
    from thinkfast.export import export_model, plan_model
    from thinkfast.stages import teacher_directory

    source = teacher_directory(str(model))
    if plan:
        document, words = plan_model(source, form, dtype)
        print(words)
    elif out is None:
        raise BadInput("OUT is missing, expected where the export goes (or --plan)")
    else:
        document = export_model(source, out, form, dtype, compat)
        print("\n".join([document["out"], *(f"note: {warning}" for warning in document["warnings"])]))
    finish(document, json_)


@app.command()
def solve(
    model: Model,
    problem: Annotated[
        str | None, typer.Argument(help="A problem; by default, or with -, a line each on stdin.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Time for each problem, e.g. 5s or 500ms.")] = "5s",
    problems: Annotated[Path | None, typer.Option(help="JSONL rows with problem, or a .txt of lines.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="majority, adaptive, best_of_n, or weighted (the default with --reward).")
    ] = None,
    reward: Reward = None,
    n: Annotated[int, typer.Option(min=1, help="Chains of thought a problem, at most.")] = 256,
    temperature: float = 0.8,
    slots: Annotated[int, typer.Option(help="Chains decoded at once.")] = 64,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Answer within a budget: draw as many chains of thought as fit, and vote."""
    from thinkfast import stages
    from thinkfast.serve import terminal

    settings = terminal.settings(budget, strategy, n, temperature, slots, seed, reward)
    texts = terminal.read_texts(problem, problems)
    found = terminal.solve_texts(stages.teacher_directory(str(model)), texts, settings)
    finish(found[0] if problem not in (None, "-") else found, json_)


@app.command()
def serve(
    models: Annotated[list[Path], typer.Argument(help="Model directories, or 'bundled'.")],
    host: Annotated[str, typer.Option(help="Address to bind; one that others can reach needs --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port, 0 for any.")] = 8000,
    keys: Annotated[Path | None, typer.Option(help="TOML with [[key]] name, sha256, requests_per_minute.")] = None,
    slots: Annotated[int, typer.Option(help="Chains decoded at once by each model.")] = 64,
    queue: Annotated[int, typer.Option(min=1, help="Open requests; beyond them 429.")] = 128,
    max_prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 4096,
    max_n: Annotated[int, typer.Option(min=1, help="Choices of a request.")] = 64,
    max_budget: Annotated[str, typer.Option(help="Longest time of a request.")] = "60s",
    reward: Reward = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
) -> None:
    """Serve models in OpenAI's protocol, with time budgets, and a page at /."""
    from thinkfast import stages
    from thinkfast.serve import launch

    limits = launch.limits(max_prompt, max_tokens, max_n, max_budget, queue)
    directories = [stages.teacher_directory(str(model)) for model in models]
    launch.serve_models(directories, host, port, slots, limits, keys, reward, log_prompts)


@app.command()
def doctor(json_: Json = False) -> None:
    """Tell what this machine has and what it lacks, and test the whole road; status 1 when something is wrong."""
    from thinkfast.doctor import MARKS, examine

    findings = examine()
    for finding in findings:
        print(f"{MARKS[finding.ok]:<4}{finding.what:<16}{finding.found}")
    finish([asdict(finding) for finding in findings], json_)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"thinkfast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Distil a Transformer into a Mamba or hybrid student and compare them at equal measured time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 when the work failed, 2 for bad input, 130 when interrupted."""
    from thinkfast.records import Failed

    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = typer.main.get_command(app)
    try:
        with command.make_context("thinkfast", given) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except TyperException as error:
        return _tell(2, error.format_message())
    except BadInput as error:
        return _tell(2, str(error))
    except Failed as error:
        return _tell(1, str(error))
    except KeyboardInterrupt as interrupt:
        place = f" in {interrupt.args[0]}" if interrupt.args else ""
        return _tell(130, f"interrupted; everything finished so far is kept{place}")
    except OSError as error:
        known = line_of(error)
        if known is None:
            raise
        return _tell(*known)
    return 0


def _tell(status: int, message: str) -> int:
    print(f"thinkfast: {' '.join(message.split())}", file=sys.stderr)
    return status
