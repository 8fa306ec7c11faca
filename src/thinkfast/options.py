"""What the commands share: arguments and options that several of them take, and how a command ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from thinkfast.errors import BadInput

Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON on stdout.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. distill.lr=2e-5.")
]
Out = Annotated[Path | None, typer.Option(help="Where everything goes, by default runs/ and the recipe's name.")]
Model = Annotated[Path, typer.Argument(help="A stock model directory, or 'bundled'.")]
Attention = Annotated[str, typer.Option(help="Layers that stay attention, e.g. 1,3; by default none.")]
Init = Annotated[str, typer.Option(help="New mixers start from 'attention' or 'random'.")]
Seed = Annotated[int, typer.Option(help="Fixes every random number.")]
Source = Annotated[Path, typer.Argument(help="A directory of samples, or JSONL with problem, answer, completions.")]
Sources = Annotated[list[Path], typer.Argument(help="Directories of samples, or JSONL with completions.")]
Reward = Annotated[
    Path | None, typer.Option("--reward", help="A verifier of train-reward, or a published reward model.")
]
Rewards = Annotated[list[Path] | None, typer.Option("--rewards", help="Rewards of the sources, in their order.")]
OpenEnded = Annotated[bool, typer.Option("--open-ended", help="Prompts without a right answer.")]
ProblemsFile = Annotated[Path | None, typer.Option("--problems", help="What a directory of samples answers.")]


def numbers(text: str) -> list[int]:
    """Whole numbers out of "1,3"."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadInput(f"{text!r}: expected whole numbers with commas, e.g. 1,3") from None


def finish(document: Any, as_json: bool) -> None:
    """Prints a command's document as one line of JSON where it was asked for."""
    if as_json:
        print(json.dumps(document))
