"""The parts of a recipe that say how a student is made: mixers, layers, stages of training."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0)]
LossName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "cross_entropy"]
Losses = LossName | dict[LossName, Weight]
Inside = Annotated[float, Field(gt=0, lt=1)]
StageName = Literal["matrices", "align", "distill", "sft", "on_policy"]
LAYERWISE = ("matrices", "align")
WHOLE = ("sft", "on_policy")
"""Stages that never cut a document."""
Mixer = Literal["mamba2", "discrete", "mamba1"]
Init = Literal["attention", "random"]


class Section(BaseModel):
    """A table of a recipe: frozen, no unknown keys, no silent conversion of text to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Training(Section):
    """A stage of training; the rate warms up linearly over `warmup` of the tokens and falls to `min_lr` of its peak.

    A step takes `accumulate` batches of `batch_tokens`, over all processes. With `row_tokens` a batch is rows of that
    many tokens, cut from all documents one behind another; without it no document sees another. Every
    `save_every` steps the state and a model are saved.
    """

    tokens: Annotated[int, Field(ge=0)]
    lr: Positive
    batch_tokens: Count = 3072
    accumulate: Count = 1
    warmup: Share = 0.05
    min_lr: Share = 0.1
    weight_decay: Weight = 0.0
    schedule: Literal["cosine", "wsd"] = "cosine"
    seed: Seed = 0
    save_every: Count = 250
    row_tokens: Count | None = None


class Matrices(Training):
    """Every new mixer's matrix learns the attention matrix, on the first `length` tokens of each document."""

    tokens: Annotated[int, Field(ge=0)] = 100_000
    lr: Positive = 5e-3
    length: Count = 256


class Align(Training):
    """Layer-wise alignment: every new mixer learns to give what the teacher's mixer gives for the same input (weight
    `mixer`), or to make its block give what the teacher's block gives (weight `block`)."""

    tokens: Annotated[int, Field(ge=0)] = 400_000
    lr: Positive = 3e-3
    mixer: Weight = 1.0
    block: Weight = 0.0


class Distill(Training):
    """End to end: the student's next-token distribution learns the teacher's.

    `loss` is a name, or weights of several; with `last_loss` the weights move to that one between the two shares of the
    tokens in `blend`. `beta` is for the jsd, `alpha` for the skewed divergences.
    """

    tokens: Annotated[int, Field(ge=0)] = 4_000_000
    lr: Positive = 2e-3
    loss: Losses = "forward_kl"
    last_loss: Losses | None = None
    blend: tuple[Share, Share] = (0.5, 0.9)
    temperature: Positive = 1.0
    beta: Inside = 0.5
    alpha: Inside = 0.1


class Isolated(Training):
    """A stage whose documents do not see each other: never cut into rows together with others."""

    @model_validator(mode="after")
    def _whole_documents(self) -> Self:
        if self.row_tokens is not None:
            raise ValueError(f"row_tokens is {self.row_tokens}, but no document is cut in this stage: leave it out")
        return self


class Sft(Isolated):
    """Supervised fine-tuning: cross-entropy on the completions of the corpus, without the teacher. A batch is whole
    documents in one row, each read as if it stood alone."""

    tokens: Annotated[int, Field(ge=0)] = 500_000
    lr: Positive = 5e-4


class OnPolicy(Isolated):
    """The student answers prompts of the corpus and learns the teacher's distribution on its own answers
    (arXiv 2306.13649). Every round draws `prompts` of them anew; `share` of them are answered by the student, the
    others keep the corpus' completion."""

    tokens: Annotated[int, Field(ge=0)] = 300_000
    lr: Positive = 3e-4
    loss: Losses = "jsd"
    temperature: Positive = 1.0
    beta: Inside = 0.5
    alpha: Inside = 0.1
    prompts: Count = 64
    share: Share = 1.0
    max_tokens: Count = 1024
    sampling_temperature: Weight = 1.0
    slots: Count = 64


class Stages(Section):
    """The settings of every stage, and which of them run, in that order."""

    mixer: Mixer = "mamba2"
    init: Init = "attention"
    seed: Seed = 0
    stages: tuple[StageName, ...] = ("align", "distill")
    matrices: Matrices = Matrices()
    align: Align = Align()

    @model_validator(mode="after")
    def _each_stage_once(self) -> Self:
        for place, stage in enumerate(self.stages):
            if stage in self.stages[:place]:
                raise ValueError(f"stages names {stage!r} twice")
        return self


class Base(Stages):
    """Mixers for every layer, aligned once: students that start from it take those of the layers they replace."""

    stages: tuple[StageName, ...] = ("align",)

    @model_validator(mode="after")
    def _layerwise(self) -> Self:
        for stage in self.stages:
            if stage not in LAYERWISE:
                raise ValueError(
                    f"stages names {stage!r}, but a base is trained layer by layer: {', '.join(LAYERWISE)}"
                )
        return self


class Student(Stages):
    """One student. Layers in `attention` stay attention, or the `keep` best of a `ranking` that `thinkfast rank-layers`
    wrote. It starts from the teacher or from the recipe's base. Stages start from the sections of that name."""

    name: Name
    attention: tuple[Annotated[int, Field(ge=0)], ...] = ()
    ranking: str | None = None
    keep: Count | None = None
    start: Literal["teacher", "base"] = "teacher"
    distill: Distill = Distill()
    sft: Sft = Sft()
    on_policy: OnPolicy = OnPolicy()

    @model_validator(mode="after")
    def _layers_once(self) -> Self:
        if (self.ranking is None) != (self.keep is None):
            raise ValueError("ranking and keep belong together")
        if self.ranking is not None and self.attention:
            raise ValueError("attention and ranking exclude each other")
        return self


class Compute(Section):
    """How training computes on several processes: in `dtype` with float32 weights behind it, and with activations kept
    or computed again for the backward pass."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False


class Watching(Section):
    """What to see of training: greedy answers of the student at every save; TensorBoard and Weights & Biases besides
    metrics.jsonl."""

    answers: Annotated[int, Field(ge=0)] = 1
    tensorboard: bool = False
    wandb: bool = False
