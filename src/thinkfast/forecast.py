"""What a recipe's training takes, told before it starts: memory on every GPU, tokens, FLOPs, hours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thinkfast import ranks, runtime
from thinkfast.distill.cost import (
    GIB,
    SHARE,
    Card,
    Cost,
    Phase,
    Setting,
    check_memory,
    cost,
    cost_document,
    parse_gpus,
)
from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import read_config
from thinkfast.model.config import DecoderConfig
from thinkfast.model.foreign import parse
from thinkfast.recipe import Recipe
from thinkfast.sections import LAYERWISE, Stages, Student, Training
from thinkfast.stages import layer_plan, teacher_directory
from thinkfast.student.plan import LayerPlan

SHAPES = "shapes.json"


def teacher_shape(path: str) -> DecoderConfig:
    """The shape of a teacher: of a model directory, or of a published model by name. Raises BadInput for neither."""
    known = json.loads((runtime.ASSETS / SHAPES).read_text(encoding="utf-8"))
    if path in known and not Path(path).is_dir():
        return parse(known[path], path)[1]
    try:
        return read_config(teacher_directory(path))
    except BadInput as error:
        if Path(path).is_dir() or path == "bundled":
            raise
        raise BadInput(f"{error}; shapes are known by name of {', '.join(known)}") from None


def phases(settings: Stages) -> Iterator[Phase]:
    """The stages that train, in their order."""
    for name in settings.stages:
        given: Training = getattr(settings, name)
        if given.tokens:
            rows = given.row_tokens or min(given.batch_tokens, 2048)
            yield Phase(name, given.tokens, given.batch_tokens, rows, name in LAYERWISE, name != "sft")


def costs(recipe: Recipe, processes: int, card: Card) -> dict[str, list[Cost]]:
    """What every phase of the base and of every student takes on `processes` cards.

    Raises BadInput for a student that the teacher cannot become.
    """
    teacher = teacher_shape(recipe.teacher.path)
    setting = Setting(processes, recipe.compute.dtype == "bfloat16", recipe.compute.recompute)
    found: dict[str, list[Cost]] = {}
    if recipe.base is not None:
        shape = LayerPlan((), recipe.base.init, mixer=recipe.base.mixer).student_config(teacher)
        found["base"] = [cost(teacher, shape, phase, setting, card) for phase in phases(recipe.base)]
    for student in recipe.student:
        shape = student_shape(student, teacher)
        found[student.name] = [cost(teacher, shape, phase, setting, card) for phase in phases(student)]
    return found


def student_shape(student: Student, teacher: DecoderConfig) -> DecoderConfig:
    """The shape of a student. Raises BadInput naming the student."""
    try:
        return layer_plan(student).student_config(teacher)
    except BadInput as error:
        raise BadInput(f"student {student.name}: {error}") from None


def tell_plan(recipe: Recipe, gpus: str) -> dict[str, Any]:
    """Prints and returns what a recipe takes on `gpus` ("8xH100"). Raises BadInput where it needs more memory than a
    card has."""
    processes, card = parse_gpus(gpus)
    found = costs(recipe, processes, card)
    print(f"{'model':<16} {'stage':<10}{'tokens':>10}{'GiB a GPU':>12}{'FLOPs':>11}{'hours':>9}")
    for name, rows in found.items():
        for row in rows:
            told = f"{row.phase.tokens:>10.3g}{row.bytes / GIB:>12.1f}{row.flops:>11.2e}{row.hours:>9.2f}"
            print(f"{name:<16} {row.phase.name:<10}{told}")
    hours = sum(row.hours for rows in found.values() for row in rows)
    print(f"{processes} x {card.name} for {hours:.1f} hours, if {SHARE:.0%} of their peak is reached")
    for rows in found.values():
        for row in rows:
            check_memory(row, card.memory, f"every {card.name}")
    return {
        "gpus": processes,
        "card": card.name,
        "share_of_peak": SHARE,
        "hours": round(hours, 3),
        "models": {name: [cost_document(row) for row in rows] for name, rows in found.items()},
    }


def check_here(recipe: Recipe) -> None:
    """Refuses what this machine has no memory for, before any work. Raises BadInput naming stage and need."""
    team = ranks.current()
    on_gpu = team.device != "cpu"
    if on_gpu:
        import torch

        available, where = float(torch.cuda.get_device_properties(team.device).total_memory), "every GPU"
    else:
        # All processes of a machine share its memory; on a CPU each holds its part of it.
        available, where = float(runtime.memory_bytes() or float("inf")), "this machine"
    for rows in costs(recipe, team.size, Card("this", available, 1.0)).values():
        for row in rows:
            check_memory(row if on_gpu else row.of_all(team.size), available, where)
