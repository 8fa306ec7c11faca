"""Students by conversion and training: every stage of a recipe, one after the other, each resumable."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfast import progress, ranks, records, rounds
from thinkfast.errors import BadInput
from thinkfast.sections import LAYERWISE, WHOLE, Base, Compute, Distill, Losses, OnPolicy, Student, Training, Watching
from thinkfast.sections import Stages as StageSettings
from thinkfast.stages import Stages, calibration_ids, layer_plan, ranking_input

if TYPE_CHECKING:
    from thinkfast.data.corpus import Corpus
    from thinkfast.distill.losses import LossSchedule
    from thinkfast.distill.trainer import Progress, TrainSettings
    from thinkfast.model.config import DecoderConfig
    from thinkfast.model.decoder import Decoder
    from thinkfast.recipe import Recipe

ON_ONE = Compute()
ANSWERS = "answers.jsonl"
ANSWER_TOKENS = 1024


def make_base(
    base: Base,
    teacher_dir: Path,
    corpus: Corpus,
    held_out: int,
    directory: Path,
    stages: Stages,
    watch: Watching,
    compute: Compute = ON_ONE,
) -> Path:
    """Converts every layer and aligns the mixers, for students with any attention layers. Returns the directory.

    Goes on from the last saved training state. Raises Failed when training diverges.
    """
    inputs = {"teacher": records.hash_path(teacher_dir, records.MODEL_FILES), "corpus": corpus.identity}
    settings = {**base.model_dump(mode="json"), "held_out": held_out}
    with stages.open("base", directory, settings=settings, inputs=inputs) as run:
        if not run.done:
            from thinkfast.model.checkpoint import load_model
            from thinkfast.student.convert import convert
            from thinkfast.student.plan import LayerPlan

            teacher, training = load_model(teacher_dir), corpus.slice(0, len(corpus) - held_out)
            plan = LayerPlan((), base.init, mixer=base.mixer)
            model = convert(teacher, plan, calibration_ids(training), base.seed)
            _together(teacher, model, compute)
            _train(base, teacher, model, training, teacher_dir, directory, run, watch)
            _write(model, directory, teacher_dir)
            run.note("train", _last_rows(directory / "metrics.jsonl"))
            run.note("result", f"a mixer for each of {model.config.num_layers} layers")
    return _cleared(directory)


def make_student(
    student: Student,
    teacher_dir: Path,
    corpus: Corpus,
    held_out: int,
    directory: Path,
    stages: Stages,
    watch: Watching,
    base: Path | None = None,
    compute: Compute = ON_ONE,
) -> None:
    """Converts one student, or assembles it from a base, and runs its stages; its directory is a model from the
    conversion on, written anew whenever the training state is saved.

    Goes on from the last saved training state. Raises Failed when training diverges: the model of the last saved state
    is kept.
    """
    from thinkfast.distill.trainer import evaluate_kl
    from thinkfast.model.checkpoint import load_model
    from thinkfast.student.assemble import assemble
    from thinkfast.student.convert import convert
    from thinkfast.student.plan import plan_document

    inputs = {"teacher": records.hash_path(teacher_dir, records.MODEL_FILES), "corpus": corpus.identity}
    inputs |= ranking_input(student)
    if student.start == "base":
        if base is None:
            raise BadInput(f"student {student.name}: starts from a base, but there is none")
        inputs["base"] = records.hash_path(base, records.MODEL_FILES)
    settings = {**student.model_dump(mode="json"), "held_out": held_out}
    with stages.open(f"student {student.name}", directory, settings=settings, inputs=inputs) as run:
        if run.done:
            return
        teacher, plan = load_model(teacher_dir), layer_plan(student)
        training, unseen = corpus.slice(0, len(corpus) - held_out), corpus.slice(len(corpus) - held_out, len(corpus))
        if not ranks.current().rank:
            records.write_json(directory / "plan.json", plan_document(plan, teacher.config, calibrated=True))
        if base is not None and student.start == "base":
            model = assemble(teacher, load_model(base), plan.attention)
        else:
            model = convert(teacher, plan, calibration_ids(training), student.seed)
        if not run.resuming:
            _write(model, directory, teacher_dir)
        _together(teacher, model, compute)
        _train(student, teacher, model, training, teacher_dir, directory, run, watch)
        run.note("kl", evaluate_kl(teacher, model, unseen))
        _write(model, directory, teacher_dir)
        run.note("train", _last_rows(directory / "metrics.jsonl"))
        run.note("result", f"KL {run.notes['kl']:.4f} nats a token on text it was not trained on")
    _cleared(directory)


def _cleared(directory: Path) -> Path:
    """A finished directory without training states."""
    if not ranks.current().rank:
        for state in directory.glob("*.state"):
            state.unlink()
        for state in directory.glob("*.state.d"):
            shutil.rmtree(state)
    return directory


def _together(teacher: Decoder, model: Decoder, compute: Compute) -> None:
    """Shards both models over the processes that torchrun started, if it did."""
    import torch

    from thinkfast.distill import parallel

    team = ranks.current()
    if not team.together and compute.dtype != "float32":
        raise BadInput(f"compute.dtype {compute.dtype}: needs torchrun, also for one process (docs/cluster.md)")
    model.recompute = compute.recompute
    parallel.shard(team, teacher, model, getattr(torch, compute.dtype))


def _write(model: Decoder, directory: Path, teacher_dir: Path) -> Decoder | None:
    """Writes the model, and returns it whole; None on all processes but the first."""
    from thinkfast.distill import parallel
    from thinkfast.model.checkpoint import save_own

    whole = parallel.whole(ranks.current(), model)
    if whole is not None and not ranks.current().rank:
        save_own(whole, directory, tokenizer_from=teacher_dir)
        return whole
    return None


def _train(
    settings: StageSettings,
    teacher: Decoder,
    model: Decoder,
    training: Corpus,
    teacher_dir: Path,
    directory: Path,
    run: records.Stage,
    watch: Watching,
) -> None:
    """Runs the stages in their order. One that is done is read from its state, so that a later one can go on."""
    from thinkfast.data.corpus import batches
    from thinkfast.distill import parallel, track
    from thinkfast.distill.align import AlignLoss, align, orient
    from thinkfast.distill.losses import CROSS_ENTROPY, Loss
    from thinkfast.distill.trainer import Diverged, Watch, distill

    check_stages(settings, model.config, training)
    name = settings.name if isinstance(settings, Student) else "base"
    first = not ranks.current().rank
    log = track.both(
        track.tensorboard(directory / "tensorboard") if watch.tensorboard and first else None,
        track.weights_and_biases(directory, directory.name) if watch.wandb and first else None,
    )
    saved = partial(_saved, model, training, teacher_dir, directory, watch.answers)
    for stage in settings.stages:
        given: Training = getattr(settings, stage)
        if not given.tokens:
            continue
        how = _training(given)
        with progress.bar(f"{name}: {stage}", given.tokens) as update:
            seen = Watch(_shown(update, _work(stage, given, teacher, model)), log, saved)
            try:
                if stage == "matrices":
                    length = settings.matrices.length
                    errors = orient(teacher, model, training, how, directory, length, watch=seen)
                    run.note("matrix_error", {str(layer): round(error, 5) for layer, error in errors.items()})
                elif stage == "align":
                    weights = AlignLoss(settings.align.mixer, settings.align.block)
                    errors = align(teacher, model, training, how, directory, loss=weights, watch=seen)
                    run.note("align_error", {str(layer): round(error, 5) for layer, error in errors.items()})
                elif isinstance(given, Distill):
                    distill(teacher, model, training, how, directory, _schedule(given), watch=seen)
                elif isinstance(given, OnPolicy):
                    whole = partial(parallel.whole_everywhere, ranks.current(), model)
                    source, fixed = rounds.answered(whole, training, given, directory / "on_policy")
                    loss = _loss(given.loss, given)
                    distill(teacher, model, training, how, directory, loss, None, seen, "on_policy", source, fixed)
                else:
                    packed, hard = (
                        partial(batches, training, batch_tokens=given.batch_tokens, packed=True),
                        Loss(CROSS_ENTROPY),
                    )
                    distill(teacher, model, training, how, directory, hard, None, seen, "sft", packed, {"packed": 1})
            except Diverged as error:
                saved_before = any(directory.glob("*.state*"))
                model_is = "that of the last saved state" if saved_before else "as it was converted"
                raise records.Failed(f"{directory}: {error}; the model is {model_is}") from None


def check_students(recipe: Recipe, teacher_dir: Path, corpus: Corpus) -> None:
    """`check_stages` for the base and all students of a recipe, before the first of them is trained."""
    from thinkfast.model.checkpoint import read_config
    from thinkfast.student.plan import LayerPlan

    teacher, training = read_config(teacher_dir), corpus.slice(0, len(corpus) - recipe.corpus.held_out)
    if recipe.base is not None:
        plan = LayerPlan((), recipe.base.init, mixer=recipe.base.mixer)
        check_stages(recipe.base, plan.student_config(teacher), training)
    for student in recipe.student:
        check_stages(student, layer_plan(student).student_config(teacher), training)


def check_stages(settings: StageSettings, student: DecoderConfig, training: Corpus) -> None:
    """Raises BadInput for what a later stage would refuse when its turn comes, naming stage and setting."""
    from thinkfast.model.config import MAMBA
    from thinkfast.model.mixer import StateMixer, required
    from thinkfast.model.mixers import MIXERS

    positions, longest = student.max_position_embeddings, int(training.lengths.max())
    for stage in settings.stages:
        given: Training = getattr(settings, stage)
        if not given.tokens:
            continue
        rows = given.row_tokens
        if rows is not None and rows > min(positions, training.tokens):
            has = f"the teacher has {positions} positions and {training.path} {training.tokens} tokens"
            raise BadInput(f"{stage}.row_tokens {rows}: {has}, expected at most the smaller of them")
        if rows is None and longest > positions:
            many = int((training.lengths > positions).sum())
            raise BadInput(
                f"{stage}: {many} documents of {training.path} are longer than the teacher's {positions} positions, "
                f"the longest {longest}; leave them out" + ("" if stage in WHOLE else f", or set {stage}.row_tokens")
            )
        if stage in LAYERWISE and MAMBA not in student.layer_types:
            raise BadInput(
                f"{stage}: the student replaces no attention layer of the teacher: there is nothing to align"
            )
        if stage == "matrices" and MIXERS[required(student).kind].matrix is StateMixer.matrix:
            raise BadInput(f"{required(student).title} has no mixer matrix a head: leave the stage 'matrices' out")
        if isinstance(given, Distill):
            _schedule(given)
        if isinstance(given, OnPolicy):
            _loss(given.loss, given)
            rounds.check_room(training, given, student)


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
        accumulate=settings.accumulate,
        save_every=settings.save_every,
        row_tokens=settings.row_tokens,
    )


def _loss(kind: Losses, settings: Distill | OnPolicy) -> Any:
    from thinkfast.distill.losses import Loss

    weights: str | Mapping[str, float] = kind if isinstance(kind, str) else {str(key): w for key, w in kind.items()}
    return Loss(weights, settings.beta, settings.temperature, settings.alpha)


def _schedule(settings: Distill) -> LossSchedule:
    from thinkfast.distill.losses import LossSchedule

    last = None if settings.last_loss is None else _loss(settings.last_loss, settings)
    return LossSchedule(_loss(settings.loss, settings), last, settings.blend)


def _work(stage: str, settings: Training, teacher: Decoder, model: Decoder) -> float | None:
    """The share of the peak that a token a second is; None where no peak is known."""
    from thinkfast.distill.cost import Phase, flops, peak_here

    team = ranks.current()
    peak = peak_here(team.device)
    rows = settings.row_tokens or min(settings.batch_tokens, 2048)
    phase = Phase(stage, 1, settings.batch_tokens, rows, stage in LAYERWISE, stage != "sft")
    work = flops(teacher.config, model.config, phase, recompute=False)
    return None if peak is None else work / (peak * team.size)


def _shown(update: progress.Update, share: float | None) -> Progress:
    """Shows step, loss and tokens a second, and where `share` is what one of them takes of the peak, the share reached
    (model FLOPs: what is computed a second time does not count)."""
    began: list[tuple[float, int]] = []

    def show(step: int, tokens: int, total: int, loss: float) -> None:
        now = time.monotonic()
        if not began:
            began.append((now, tokens))
        seconds, seen = now - began[0][0], tokens - began[0][1]
        words = f"step {step}, loss {loss:.4f}"
        if seconds > 0:
            words += f", {seen / seconds:,.0f} tokens/s"
            words += f", {seen / seconds * share:.0%} of the peak" if share is not None else ""
        update(min(tokens, total), words)

    return show


def _saved(
    model: Decoder, corpus: Corpus, teacher_dir: Path, directory: Path, answers: int, stage: str, step: int
) -> None:
    """Writes the model, and greedy answers to the first prompts of the corpus, once for each step."""
    from thinkfast.data.tokenizer import load_tokenizer
    from thinkfast.engine import Engine, SamplingParams

    whole = _write(model, directory, teacher_dir)
    if whole is None:
        return
    path = directory / ANSWERS
    written = path.read_text().splitlines() if path.exists() else []
    place = {"stage": stage, "step": step}
    if not answers or any(place.items() <= json.loads(line).items() for line in written):
        return
    tokenizer = load_tokenizer(teacher_dir)
    prompts = [corpus.document(index)[0] for index in range(min(answers, len(corpus)))]
    room = whole.config.max_position_embeddings - max(map(len, prompts))
    if room < 1 or not all(prompts):
        return
    params = SamplingParams(max_tokens=min(ANSWER_TOKENS, room), temperature=0)
    for prompt, (sample,) in zip(
        prompts, Engine(whole.to(ranks.current().device), len(prompts)).sample(prompts, 1, params), strict=True
    ):
        text = {"prompt": tokenizer.decode(prompt), "answer": tokenizer.decode(list(sample.token_ids))}
        written.append(json.dumps({**place, **text, "ended": sample.finish_reason}, ensure_ascii=False))
    records.write_text(path, "\n".join(written) + "\n")


def _last_rows(metrics: Path) -> dict[str, dict[str, float]]:
    """Tokens and seconds at the end of every training stage."""
    last: dict[str, dict[str, float]] = {}
    if metrics.exists():
        for line in metrics.read_text().splitlines():
            row = json.loads(line)
            last[row["stage"]] = {"tokens": row["tokens"], "seconds": row["seconds"]}
    return last
