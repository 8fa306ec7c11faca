"""Which layers should stay attention: four ways to rank them, each a `ranking.json` that students read.

Each candidate keeps one layer, and takes the other mixers from one base that was aligned in all layers. `kl` compares
the candidates as they are, `kl-trained` after the recipe's distillation (keep it short), `answers` by how many right
answers a second the trained candidates sample on held-out problems; `uniform` spreads the layers and measures nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thinkfast import progress, records, results, runtime
from thinkfast.data.corpus import Corpus
from thinkfast.data.problems import Problem
from thinkfast.errors import BadInput
from thinkfast.recipe import Recipe, SampleSettings
from thinkfast.sections import Base, Student
from thinkfast.stages import Say, Stages, make_corpus, make_problems, teacher_directory
from thinkfast.students import make_base, make_student

METHODS = ("uniform", "kl", "kl-trained", "answers")
RANKING = "ranking.json"


def rank_layers(recipe: Recipe, method: str, out: Path, say: Say = print) -> dict[str, Any]:
    """Ranks the teacher's layers and writes `out/ranking.json`; what is measured for it lies beside it and is reused.

    The document: `method`, `scores` by layer and what they are, `order` (best first), `choices` (for every number of
    layers to keep, which), and from what it was made. Raises BadInput for an unknown method, Failed when training
    diverges.
    """
    from thinkfast.model.checkpoint import read_config
    from thinkfast.student.plan import uniform

    if method not in METHODS:
        raise BadInput(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    source, stages = teacher_directory(recipe.teacher.path), Stages(say)
    layers = read_config(source).num_layers
    document: dict[str, Any] = {"method": method, "teacher": records.hash_path(source, records.MODEL_FILES)}
    with records.locked(out):
        if method == "uniform":
            document |= {"scores": None, "order": None}
            choices = {str(keep): list(uniform(layers, keep)) for keep in range(1, layers)}
        else:
            corpus = make_corpus(recipe.corpus, source, out / "corpus", stages)
            held_out = recipe.corpus.held_out
            base = make_base(
                recipe.base or Base(align=recipe.align), source, corpus, held_out, out / "base", stages, recipe.watch
            )
            document |= {"corpus": corpus.identity, "base": records.hash_path(base, records.MODEL_FILES)}
            unit, scores = _scores(method, recipe, source, corpus, base, layers, out, stages)
            best = -1 if method == "answers" else 1
            order = sorted(scores, key=lambda layer: best * scores[layer])
            document |= {"unit": unit, "scores": {str(layer): scores[layer] for layer in scores}, "order": order}
            choices = {str(keep): sorted(order[:keep]) for keep in range(1, layers)}
        document |= {
            "choices": choices,
            "settings": recipe.model_dump(mode="json", include={"corpus", "base", "align", "distill"}),
            "command": runtime.command(),
            "code": runtime.code_version(),
        }
        records.write_json(out / RANKING, document)
    return document


def _scores(
    method: str,
    recipe: Recipe,
    source: Path,
    corpus: Corpus,
    base: Path,
    layers: int,
    out: Path,
    stages: Stages,
) -> tuple[str, dict[int, float]]:
    """What the scores are, and one for each layer."""
    held_out = recipe.corpus.held_out
    if method == "kl":
        return "nats a token, untrained", _untrained(source, base, corpus.slice(len(corpus) - held_out, len(corpus)))
    problems = make_problems(recipe.problems, out / "problems", stages) if method == "answers" else []
    scores = {}
    for layer in range(layers):
        student = Student(
            name=f"keep-{layer}",
            attention=(layer,),
            start="base",
            stages=("distill",),
            mixer=recipe.base.mixer if recipe.base else "mamba2",
            matrices=recipe.matrices,
            align=recipe.align,
            distill=recipe.distill,
            sft=recipe.sft,
            on_policy=recipe.on_policy,
        )
        place = out / student.name
        make_student(student, source, corpus, held_out, place, stages, recipe.watch, base)
        if method == "answers":
            scores[layer] = _answers(place, problems, recipe.sample, out / "samples" / student.name)
        else:
            scores[layer] = float((records.read_record(place) or {})["notes"]["kl"])
    return "right answers a second" if method == "answers" else "nats a token after distillation", scores


def _untrained(source: Path, base: Path, unseen: Corpus) -> dict[int, float]:
    """KL(teacher || base with one attention layer restored) on held-out text, layer by layer."""
    from thinkfast.distill.trainer import evaluate_kl
    from thinkfast.model.checkpoint import load_model
    from thinkfast.student.assemble import assemble

    teacher, aligned = load_model(source), load_model(base)
    scores = {}
    with progress.bar("restore", teacher.config.num_layers) as update:
        for layer in range(teacher.config.num_layers):
            scores[layer] = evaluate_kl(teacher, assemble(teacher, aligned, (layer,)), unseen)
            update(layer + 1, f"layer {layer}: {scores[layer]:.4f}")
    return scores


def _answers(model: Path, problems: list[Problem], settings: SampleSettings, directory: Path) -> float:
    """Right answers of `model` a second of clock."""
    from thinkfast.scale.sample import sample_model

    with progress.bar(f"{model.name}: sample", 1.0) as update:
        drawn = sample_model(model, problems, settings, directory, model.name, update)
    graded = results.grade(records.read_samples(directory), problems)
    return sum(row.correct for row in graded) / drawn.seconds
