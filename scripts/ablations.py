"""Trains every student of a recipe and measures each on held-out text: what a stage, loss or choice buys at equal
tokens.

    python scripts/ablations.py recipes/ablations.toml --out runs/ablations --table benchmarks/results/ablations.json

Each student's divergence from the teacher is a mean over the completion tokens of held-out documents; intervals (95 %)
come from a bootstrap over documents, those of ratios to the first student from the same documents on both sides. Greedy
agreement is the share of completion tokens at which both would choose the same token. pass@1 is the share of
right samples of the recipe's held-out problems, the teacher's beside it, its interval from a bootstrap over problems.
Interrupted anywhere, it goes on where it was; the table is written anew after every student.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thinkfast import records, runtime
from thinkfast.data.chat import render_prompt
from thinkfast.data.corpus import Corpus
from thinkfast.data.problems import Problem
from thinkfast.data.tokenizer import Tokenizer, load_tokenizer
from thinkfast.distill.losses import Loss, prediction_mask
from thinkfast.engine import Engine, SamplingParams
from thinkfast.model.checkpoint import load_model
from thinkfast.model.decoder import Decoder
from thinkfast.recipe import SampleSettings, load_recipe
from thinkfast.scale.grade import extract_answer
from thinkfast.stages import Stages, generated, make_corpus, teacher_directory
from thinkfast.students import make_base, make_student

REPLICATES = 2000


@torch.no_grad()
def by_document(teacher: Decoder, student: Decoder, corpus: Corpus) -> dict[str, Any]:
    """Of every document: completion tokens, the divergence summed over them, and how often both choose alike."""
    rows = []
    for index in range(len(corpus)):
        batch = corpus.collate(np.array([index]))
        mask = prediction_mask(batch.completion)
        taught, made = teacher(batch.input_ids)[mask], student(batch.input_ids)[mask]
        divergence = Loss().positionwise(made, taught, torch.zeros(len(made), dtype=torch.long))
        rows.append((len(made), float(divergence.sum()), int((made.argmax(-1) == taught.argmax(-1)).sum())))
    return {name: [row[place] for row in rows] for place, name in enumerate(("tokens", "kl", "agree"))}


def right_samples(model: Decoder, words: Tokenizer, problems: list[Problem], settings: SampleSettings) -> list[int]:
    """Of every problem the number of its samples that are right; `n` are drawn, whatever the time."""
    engine = Engine(model, slots=max(settings.slots))
    params = SamplingParams(max_tokens=settings.max_tokens, temperature=settings.temperature, seed=settings.seed)
    drawn = engine.sample([render_prompt(words, problem.problem) for problem in problems], n=settings.n, params=params)
    return [
        sum(extract_answer(words.decode(list(sample.token_ids))) == problem.answer for sample in samples)
        for problem, samples in zip(problems, drawn, strict=True)
    ]


def pass_at_1(right: list[int], n: int) -> dict[str, Any]:
    """The mean over problems with its interval."""
    shares = np.asarray(right) / n
    drawn = np.random.default_rng(1).integers(0, len(shares), (REPLICATES, len(shares)))
    return {"pass@1": float(shares.mean()), "pass@1_interval": interval(shares[drawn].mean(1))}


def interval(values: np.ndarray) -> list[float]:
    return [float(np.quantile(values, q)) for q in (0.025, 0.975)]


def table(found: dict[str, dict[str, Any]], n: int) -> dict[str, Any]:
    """Means with intervals, and the ratio of each to the first; `n` samples a problem were drawn."""
    first = next(iter(found.values()))
    random = np.random.default_rng(0)
    drawn = random.integers(0, len(first["tokens"]), (REPLICATES, len(first["tokens"])))

    def means(row: dict[str, Any], name: str) -> np.ndarray:
        return np.asarray(row[name])[drawn].sum(1) / np.asarray(row["tokens"])[drawn].sum(1)

    rows = {}
    for arm, row in found.items():
        values, reference = means(row, "kl"), means(first, "kl")
        mean = sum(row["kl"]) / sum(row["tokens"])
        base = sum(first["kl"]) / sum(first["tokens"])
        rows[arm] = {
            **{key: value for key, value in row.items() if key not in ("tokens", "kl", "agree", "right")},
            "kl": mean,
            "kl_interval": interval(values),
            "kl_ratio": mean / base,
            "kl_ratio_interval": interval(values / reference),
            "agreement": sum(row["agree"]) / sum(row["tokens"]),
            "agreement_interval": interval(means(row, "agree")),
            **pass_at_1(row["right"], n),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--only", default="", help="names of students with commas, by default all")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    recipe, source, out = load_recipe(given.recipe), teacher_directory("bundled"), given.out
    stages = Stages(lambda line: print(line, flush=True))
    torch.set_num_threads(given.threads)
    found: dict[str, dict[str, Any]] = {}
    with records.locked(out):
        corpus = make_corpus(recipe.corpus, source, out / "corpus", stages)
        held_out = recipe.corpus.held_out
        unseen, teacher = corpus.slice(len(corpus) - held_out, len(corpus)), load_model(source)
        words, problems = load_tokenizer(source), generated(recipe.problems, "held-out")
        ceiling = out / "teacher.json"
        if not ceiling.exists():
            records.write_json(ceiling, {"right": right_samples(teacher, words, problems, recipe.sample)})
        base = None
        if recipe.base is not None:
            base = make_base(recipe.base, source, corpus, held_out, out / "base", stages, recipe.watch)
        for student in recipe.student:
            if given.only and student.name not in given.only.split(","):
                continue
            place, cache = out / student.name, out / f"{student.name}.json"
            try:
                make_student(student, source, corpus, held_out, place, stages, recipe.watch, base)
            except records.Failed as error:
                print(error, flush=True)
                continue
            if not cache.exists():
                trained = (records.read_record(place) or {})["notes"]["train"]
                model = load_model(place)
                right = right_samples(model, words, problems, recipe.sample)
                measured = {**by_document(teacher, model, unseen), "right": right}
                changed = student.model_dump(mode="json", exclude_unset=True)
                row = {"settings": changed, "train": trained, **measured}
                records.write_json(cache, row)
            found[student.name] = records.read_json(cache)
            document = {
                "command": runtime.command(),
                "code": runtime.code_version(),
                "machine": runtime.machine(),
                "recipe": recipe.model_dump(mode="json", exclude={"student"}),
                "held_out_documents": held_out,
                "replicates": REPLICATES,
                "reference": next(iter(found)),
                "problems": len(problems),
                "teacher": pass_at_1(records.read_json(ceiling)["right"], recipe.sample.n),
                "students": table(found, recipe.sample.n),
            }
            records.write_json(given.table, document)


if __name__ == "__main__":
    main()
