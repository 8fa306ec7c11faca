import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import thinkfast
from thinkfast.data.corpus import Batch, batches, write_corpus
from thinkfast.distill import trainer
from thinkfast.distill.align import align
from thinkfast.distill.losses import Loss, logits_loss, prediction_mask
from thinkfast.distill.trainer import (
    Diverged,
    Task,
    TrainSettings,
    adamw,
    corpus_source,
    distill,
    evaluate_kl,
    train,
)
from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.student.convert import convert
from thinkfast.student.plan import LayerPlan

SETTINGS = TrainSettings(tokens=4_000, lr=5e-3, batch_tokens=256, save_every=7)


class Stop(Exception):
    pass


def stop_at(step):
    def progress(done, tokens, total, loss):
        if done == step:
            raise Stop

    return progress


def rows(out_dir):
    """Metrics without the seconds, which are measured."""
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def equal(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_distillation_lowers_the_held_out_divergence(teacher, student, corpus, tmp_path):
    train_part, held_out = corpus.slice(0, 70), corpus.slice(70, 80)
    before = evaluate_kl(teacher, student, held_out)
    frozen = copy.deepcopy(teacher)
    seen = []
    done = distill(teacher, student, train_part, SETTINGS, tmp_path / "o", progress=lambda *row: seen.append(row))
    assert evaluate_kl(teacher, student, held_out) < 0.7 * before
    assert equal(teacher, frozen)
    logged = rows(tmp_path / "o")
    assert [row["step"] for row in logged] == list(range(1, done.steps + 1))
    assert logged[-1]["tokens"] == done.tokens >= SETTINGS.tokens > logged[-2]["tokens"]
    assert seen[-1] == (done.steps, done.tokens, SETTINGS.tokens, done.loss)
    assert done.seconds > 0


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd", "cross_entropy"])
def test_the_other_losses_train_too(teacher, student, corpus, tmp_path, kind):
    distill(teacher, student, corpus, SETTINGS, tmp_path, Loss(kind))
    logged = rows(tmp_path)
    assert sum(row["loss"] for row in logged[-5:]) < sum(row["loss"] for row in logged[:5])


def test_evaluation_is_the_mean_over_completion_tokens(teacher, student, corpus):
    held_out = corpus.slice(0, 9)
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(9):
            prompt, completion = held_out.document(index)
            ids = torch.tensor([prompt + completion])
            mask = prediction_mask(torch.tensor([[False] * len(prompt) + [True] * len(completion)]))
            total += logits_loss(Loss(), student(ids), teacher(ids), ids, mask, count=1).item()
            count += len(completion)
    assert evaluate_kl(teacher, student, held_out) == pytest.approx(total / count, rel=1e-4)
    assert evaluate_kl(teacher, student, held_out, batch_tokens=1) == pytest.approx(total / count, rel=1e-4)
    assert evaluate_kl(teacher, teacher, held_out) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("step", [1, 7, 16])
def test_a_stopped_run_goes_on_bit_for_bit(teacher, corpus, tmp_path, step):
    whole, resumed, lost = (convert(teacher, LayerPlan((1,)), seed=1) for _ in range(3))
    distill(teacher, whole, corpus, SETTINGS, tmp_path / "whole")
    with pytest.raises(Stop):
        distill(teacher, lost, corpus, SETTINGS, tmp_path / "cut", progress=stop_at(step))
    distill(teacher, resumed, corpus, SETTINGS, tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert equal(resumed, whole)


def test_alignment_goes_on_bit_for_bit_and_shares_the_metrics_file(teacher, corpus, tmp_path):
    whole, resumed, lost = (convert(teacher, LayerPlan((1,)), seed=1) for _ in range(3))
    errors = align(teacher, whole, corpus, SETTINGS, tmp_path / "whole")
    distill(teacher, whole, corpus, SETTINGS, tmp_path / "whole")
    with pytest.raises(Stop):
        align(teacher, lost, corpus, SETTINGS, tmp_path / "cut", progress=stop_at(9))
    assert align(teacher, resumed, corpus, SETTINGS, tmp_path / "cut") == errors
    distill(teacher, resumed, corpus, SETTINGS, tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert equal(resumed, whole)


def test_a_finished_run_is_not_run_again(teacher, corpus, tmp_path):
    one, two = (convert(teacher, LayerPlan((1,)), seed=1) for _ in range(2))
    first = distill(teacher, one, corpus, SETTINGS, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert distill(teacher, two, corpus, SETTINGS, tmp_path, progress=stop_at(0)) == first
    assert equal(one, two)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_save_every_does_not_change_the_run_and_may_change_on_resume(teacher, corpus, tmp_path):
    often = TrainSettings(tokens=4_000, lr=5e-3, batch_tokens=256, save_every=2)
    whole, resumed = (convert(teacher, LayerPlan((1,)), seed=1) for _ in range(2))
    distill(teacher, whole, corpus, SETTINGS, tmp_path / "whole")
    with pytest.raises(Stop):
        distill(teacher, resumed, corpus, often, tmp_path / "cut", progress=stop_at(5))
    distill(teacher, resumed, corpus, SETTINGS, tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_other_settings_do_not_continue_a_run(teacher, student, corpus, tmp_path):
    distill(teacher, student, corpus, SETTINGS, tmp_path)
    with pytest.raises(BadInput, match="loss = 'forward_kl', not 'jsd'"):
        distill(teacher, student, corpus, SETTINGS, tmp_path, Loss("jsd"))
    with pytest.raises(BadInput, match="was made with corpus"):
        distill(teacher, student, corpus.slice(0, 70), SETTINGS, tmp_path)


KILLED = """
import sys, time
from pathlib import Path
import torch
from thinkfast.data.corpus import Corpus
from thinkfast.distill.trainer import TrainSettings, distill

torch.set_num_threads(1)
teacher, student = torch.load(sys.argv[1], weights_only=False)
settings = TrainSettings(tokens=4_000, lr=5e-3, batch_tokens=256, save_every=3)
# Whoever kills it may be slow: it waits for its end before its last steps.
progress = lambda step, *_: time.sleep(600) if step == 8 else None
distill(teacher, student, Corpus(sys.argv[2]), settings, Path(sys.argv[3]), progress=progress)
"""


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_kill_9_and_resume_equals_the_uninterrupted_run(teacher, student, corpus, tmp_path, one_thread):
    models, resumed = tmp_path / "models.pt", copy.deepcopy(student)
    torch.save((teacher, student), models)
    arguments = [sys.executable, "-c", KILLED, str(models), str(corpus.path), str(tmp_path / "cut")]
    environment = {**os.environ, "PYTHONPATH": str(Path(thinkfast.__file__).parents[1])}
    process = subprocess.Popen(arguments, env=environment)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 4):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    logged = metrics.read_text().count("\n")
    settings = TrainSettings(tokens=4_000, lr=5e-3, batch_tokens=256, save_every=3)
    distill(teacher, student, corpus, settings, tmp_path / "whole")
    distill(teacher, resumed, corpus, settings, tmp_path / "cut")
    assert 4 < logged < len(rows(tmp_path / "whole"))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert equal(resumed, student)


def test_a_metrics_line_cut_by_a_kill_is_dropped(teacher, corpus, tmp_path):
    whole, resumed, lost = (convert(teacher, LayerPlan((1,)), seed=1) for _ in range(3))
    distill(teacher, whole, corpus, SETTINGS, tmp_path / "whole")
    with pytest.raises(Stop):
        distill(teacher, lost, corpus, SETTINGS, tmp_path / "cut", progress=stop_at(9))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"stage": "dist')
    distill(teacher, resumed, corpus, SETTINGS, tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def loop(model, loss_of, corpus, settings, out_dir, floor=1.0):
    def scaled(batch, count, share):
        return loss_of(batch)

    source = corpus_source(corpus, settings)
    return train(Task("test", model, model.parameters(), source, lambda batch: 1, scaled, floor, {}), settings, out_dir)


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(corpus, tmp_path):
    model = torch.nn.Linear(2, 1)
    kept = []

    def loss_of(batch: Batch):
        loss_of.calls += 1
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        factor = float("nan") if loss_of.calls == 12 else 1.0
        return factor * model(torch.ones(2)).pow(2).sum()

    loss_of.calls = 0
    with pytest.raises(Diverged, match=r"step 12 \(loss nan.*holds the last saved state"):
        loop(model, loss_of, corpus, SETTINGS, tmp_path)
    assert all(torch.equal(value, kept[-1][name]) for name, value in model.state_dict().items())
    saved = torch.load(tmp_path / "test.state", weights_only=True)
    assert saved["counters"]["step"] == 7
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_an_infinite_gradient_stops_too(corpus, tmp_path):
    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    with pytest.raises(Diverged, match=r"gradient norm (inf|nan).*nothing was saved yet"):
        loop(model, lambda batch: model.weight.abs().sqrt().sum(), corpus, SETTINGS, tmp_path)


def test_a_growing_loss_is_divergence_and_a_bad_start_is_not(corpus, tmp_path):
    def runner(factors):
        model = torch.nn.Linear(1, 1)
        values = iter(factors)
        return lambda name: loop(
            model, lambda batch: next(values) * (1 + 0 * model.weight.sum()), corpus, SETTINGS, tmp_path / name
        )

    with pytest.raises(Diverged, match="diverged"):
        runner([0.5] * 5 + [50.0] * 100)("grows")
    runner([20.0] * 100)("high from the start")
    runner([0.001] * 5 + [0.9] * 100)("below what is natural")


def test_learning_rate_warms_up_and_decays():
    cosine = TrainSettings(tokens=1000, lr=2.0, warmup=0.1, min_lr=0.25)
    assert cosine.lr_at(50) == pytest.approx(1.0)
    assert cosine.lr_at(100) == pytest.approx(2.0)
    assert cosine.lr_at(550) == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert cosine.lr_at(1000) == cosine.lr_at(1400) == pytest.approx(0.5)
    steady = TrainSettings(tokens=1000, lr=2.0, warmup=0.1, min_lr=0.0, schedule="wsd")
    assert steady.lr_at(100) == steady.lr_at(799) == 2.0
    assert steady.lr_at(900) == pytest.approx(1.0)
    assert steady.lr_at(1000) == pytest.approx(0.0)
    assert all(math.isfinite(TrainSettings(tokens=10, lr=1.0, warmup=w).lr_at(10)) for w in (0.0, 1.0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("batch_tokens", 0),
        ("save_every", 0),
        ("warmup", 1.5),
        ("min_lr", -0.1),
        ("weight_decay", -1.0),
        ("schedule", "linear"),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(BadInput, match=f"^{field} is "):
        TrainSettings(**{"tokens": 10, "lr": 0.1, field: value})


def test_weight_decay_spares_vectors(student):
    optimizer = adamw(list(student.parameters()), TrainSettings(tokens=1, lr=0.1, weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in student.named_parameters():
        vector = name.endswith(("norm.weight", "layernorm.weight", "A_log", ".D", "dt_bias", "bias"))
        assert decay[id(parameter)] == (0.0 if vector else 0.3), name


def test_a_batch_without_completions_is_passed_over(teacher, student, tmp_path):
    documents = [([1, 2, 3], []), ([4, 5], [6, 7])] * 5
    corpus = write_corpus(tmp_path / "c", documents, "f", 24)
    settings = TrainSettings(tokens=40, lr=1e-3, batch_tokens=4)
    done = distill(teacher, student, corpus, settings, tmp_path / "o")
    assert done.tokens == 40
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "o"))


@pytest.mark.parametrize("packed", [False, True])
def test_documents_of_one_token_teach_nothing_and_that_is_told(teacher, student, tmp_path, packed):
    corpus = write_corpus(tmp_path / "c", [([], [1])] * 9, "f", 24)
    source = partial(batches, corpus, batch_tokens=4, packed=packed)
    with pytest.raises(BadInput, match="distill: no batch of an epoch has a token to learn that follows another one"):
        distill(teacher, student, corpus, TrainSettings(tokens=10, lr=1e-3), tmp_path, source=source)


def test_different_vocabularies_are_refused(teacher, student, corpus, tmp_path):
    other = Decoder(DecoderConfig(20, 16, 24, 2, 1, 8, (ATTENTION,) * 3))
    with pytest.raises(BadInput, match="the teacher has 20 tokens and the student 24"):
        distill(other, student, corpus, SETTINGS, tmp_path)
    with pytest.raises(BadInput, match="ids up to 23, the models have 20"):
        trainer.check_vocabulary(other, other, corpus)
