"""The commands about what samples are worth: rewards, overlap, retention, adaptive sampling and the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thinkfast.options import Json, Model, ProblemsFile, Seed, Source, Sources, finish, numbers

app = typer.Typer()


@app.command()
def reward(
    model: Annotated[Path, typer.Argument(help="A verifier of train-reward, or a published reward model.")],
    source: Source,
    out: Annotated[Path, typer.Argument(help="A directory for the rewards.")],
    problems: ProblemsFile = None,
    how: Annotated[str, typer.Option(help="Step scores become one: last, min, product or mean.")] = "last",
    layout: Annotated[str | None, typer.Option(help="Of a process model; by default what its files show.")] = None,
    json_: Json = False,
) -> None:
    """Score every sample; goes on where it was cut off."""
    from thinkfast import rewards

    document = rewards.score_file(model, source, problems, out, rewards.known_how(how), layout)
    print(f"{document['samples']:,} samples scored in {document['seconds']:.1f} s")
    finish(document, json_)


@app.command()
def train_reward(
    model: Model,
    source: Source,
    out: Annotated[Path, typer.Argument(help="The verifier's directory.")],
    problems: ProblemsFile = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 500,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-4,
    frozen: Annotated[bool, typer.Option("--frozen", help="Only the head learns.")] = False,
    rollouts: Annotated[int, typer.Option(min=0, help="Continuations a step, to label steps with.")] = 0,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Train a verifier on graded samples; measured on every fourth problem, which it does not see."""
    from thinkfast import rewards, stages

    directory, values = stages.teacher_directory(str(model)), {"steps": steps, "lr": lr, "frozen": frozen, "seed": seed}
    document = rewards.train_file(directory, source, problems, out, values, rollouts)
    print("\n".join(rewards.verification_in_words(document)))
    finish(document, json_)


@app.command()
def overlap(
    test: Annotated[str, typer.Argument(help="A problem set by name or file.")],
    train: Annotated[str, typer.Argument(help="What a model was trained on, e.g. gsm8k:train.")],
    json_: Json = False,
) -> None:
    """Tell which problems of a test set also stand in a training set."""
    from thinkfast.data.overlap import report_overlap

    document = report_overlap(test, train)
    print(f"{document['overlapping']} of {document['problems']} problems of {test} stand in {train}")
    finish(document, json_)


@app.command()
def retain(
    models: Annotated[list[Path], typer.Argument(help="Model directories, the teacher first.")],
    samples: Annotated[Path, typer.Argument(help="Their samples, in a directory of each model's name.")],
    problems: Annotated[Path, typer.Option("--problems", help="What the samples answer.")],
    texts: Annotated[int, typer.Option(min=1, help="Completions of the teacher to compare on, token by token.")] = 200,
    out: Annotated[Path | None, typer.Option(help="A file for the document.")] = None,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Tell what distillation cost: well-formed answers, length, repetition, KL and agreement, level by level."""
    from thinkfast import retention, stages

    directories = [stages.teacher_directory(str(model)) for model in models]
    document = retention.retain(directories, samples, problems, texts, seed, out)
    print("\n".join(retention.in_words(document)))
    finish(document, json_)


@app.command()
def adapt(
    sources: Sources,
    problems: ProblemsFile = None,
    error: Annotated[float, typer.Option(help="Chance that a stopped vote would still turn.")] = 0.05,
    slots: Annotated[int, typer.Option(min=1, help="Samples side by side, as in the run.")] = 128,
    first: Annotated[float, typer.Option("--from", help="First seconds a problem.")] = 0.01,
    last: Annotated[float, typer.Option("--to", help="Last seconds a problem.")] = 0.2,
    out: Annotated[Path | None, typer.Option(help="A file for the document.")] = None,
    json_: Json = False,
) -> None:
    """Replay timed samples with decided votes stopped, against sampling all problems alike."""
    from thinkfast import spending

    document = spending.adapt_sources(sources, problems, (first, last), error, slots, out)
    print("\n".join(spending.adapted_in_words(document)))
    finish(document, json_)


@app.command()
def plan(
    sources: Sources,
    problems: ProblemsFile = None,
    pilot: Annotated[int, typer.Option(min=1, help="Samples a problem to learn from.")] = 4,
    ks: Annotated[str, typer.Option(help="Samples a problem to foretell.")] = "1,2,4,8,16,32,64",
    first: Annotated[float, typer.Option("--from", help="First seconds a problem.")] = 0.01,
    last: Annotated[float, typer.Option("--to", help="Last seconds a problem.")] = 0.2,
    out: Annotated[Path | None, typer.Option(help="A file for the document.")] = None,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Foretell coverage and majority from the first few samples of each problem, and the best model at a budget."""
    from thinkfast import spending
    from thinkfast.recipe import Compare, section

    grid = {"first": first, "last": last, "points": 25}
    settings = section(Compare, {"ks": numbers(ks), "grid": grid, "seed": seed})
    document = spending.plan_sources(sources, problems, settings, pilot, out)
    print("\n".join(spending.planned_in_words(document)))
    finish(document, json_)
