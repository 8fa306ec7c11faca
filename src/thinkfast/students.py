"""Students by conversion and training: every stage of a recipe, one after the other, each resumable."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thinkfast import progress, ranks, records
from thinkfast.errors import BadInput
from thinkfast.sections import LAYERWISE, Base, Compute, Distill, Losses, OnPolicy, Student, Training, Watching
from thinkfast.sections import Stages as StageSettings
from thinkfast.stages import Stages, calibration_ids, layer_plan, ranking_input

if TYPE_CHECKING:
    from thinkfast.data.corpus import Batch, Corpus, Cursor
    from thinkfast.distill.losses import LossSchedule
    from thinkfast.distill.trainer import Progress, Source, TrainSettings
    from thinkfast.model.decoder import Decoder

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
    from thinkfast.distill import track
    from thinkfast.distill.align import AlignLoss, align, orient
    from thinkfast.distill.losses import CROSS_ENTROPY, Loss
    from thinkfast.distill.trainer import Diverged, Watch, distill

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
                    source, fixed = _answered(model, training, given, directory / "on_policy")
                    loss = _loss(given.loss, given)
                    distill(teacher, model, training, how, directory, loss, None, seen, "on_policy", source, fixed)
                else:
                    packed, hard = (
                        partial(batches, training, batch_tokens=given.batch_tokens, packed=True),
                        Loss(CROSS_ENTROPY),
                    )
                    distill(teacher, model, training, how, directory, hard, None, seen, "sft", packed, {"packed": 1})
            except Diverged as error:
                raise records.Failed(f"{directory}: {error}; the model is that of the last saved state") from None


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


def _answered(model: Decoder, corpus: Corpus, settings: OnPolicy, directory: Path) -> tuple[Source, dict[str, Any]]:
    """Batches of the student's own answers, round after round, and what fixes them. A round is drawn when its first
    batch is needed, by the student of that moment, and kept: a resumed run finds the same. All processes must read
    them in step."""
    from thinkfast.data.corpus import Cursor, batches

    longest = int(corpus.prompt_lengths.max()) + settings.max_tokens
    if longest > model.config.max_position_embeddings:
        raise BadInput(
            f"on_policy.max_tokens {settings.max_tokens}: with the longest prompt that is {longest} tokens, "
            f"the model has {model.config.max_position_embeddings} positions"
        )

    def source(cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        place, position = cursor.epoch, cursor.position
        while True:
            drawn = _round(model, corpus, settings, directory / f"{place:05d}", place)
            for batch, following in batches(drawn, Cursor(cursor.seed, 0, position), settings.batch_tokens):
                last = following.epoch > 0
                yield batch, Cursor(cursor.seed, place + last, 0 if last else following.position)
                if last:
                    break
            place, position = place + 1, 0

    names = ("prompts", "share", "max_tokens", "sampling_temperature")
    return source, {f"on_policy.{name}": getattr(settings, name) for name in names}


def _round(model: Decoder, corpus: Corpus, settings: OnPolicy, directory: Path, place: int) -> Corpus:
    """The corpus of one round: prompts of `corpus` with the student's completion, or with their own."""
    from thinkfast.data.corpus import Corpus, write_corpus
    from thinkfast.distill import parallel
    from thinkfast.engine import Engine, SamplingParams

    team = ranks.current()
    if team.agree((directory / "corpus.json").exists()):
        return Corpus(directory)
    random = np.random.default_rng([settings.seed, place])
    chosen = random.choice(len(corpus), min(settings.prompts, len(corpus)), replace=False)
    documents = [corpus.document(int(index)) for index in chosen]
    asked = np.flatnonzero((random.random(len(documents)) < settings.share) & [bool(p) for p, _ in documents]).tolist()
    params = SamplingParams(
        max_tokens=settings.max_tokens, temperature=settings.sampling_temperature, seed=settings.seed + place
    )
    ends = model.config.eos_token_ids
    if asked:
        # Each process answers its share with a whole student; an answer depends on its prompt and the seed alone.
        mine, student = asked[team.rank :: team.size], parallel.whole_everywhere(team, model)
        prompts = [documents[i][0] for i in mine]
        samples = Engine(student.to(team.device), settings.slots).sample(prompts, 1, params) if mine else []
        answers = [(list(sample.token_ids), sample.finish_reason) for (sample,) in samples]
        for i, (ids, reason) in team.collect(list(zip(mine, answers, strict=True))):
            documents[i] = (documents[i][0], [*ids, *(ends[:1] if reason == "stop" else ())])
    if not team.rank:
        write_corpus(directory, documents, corpus.fingerprint, corpus.vocab_size)
    team.wait()
    return Corpus(directory)


def _last_rows(metrics: Path) -> dict[str, dict[str, float]]:
    """Tokens and seconds at the end of every training stage."""
    last: dict[str, dict[str, float]] = {}
    if metrics.exists():
        for line in metrics.read_text().splitlines():
            row = json.loads(line)
            last[row["stage"]] = {"tokens": row["tokens"], "seconds": row["seconds"]}
    return last
