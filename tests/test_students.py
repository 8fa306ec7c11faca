"""Every stage of a recipe on a tiny teacher: in any order, resumable, and what each leaves on disk."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thinkfast import progress, records, rounds, students
from thinkfast.data.corpus import Corpus, Cursor, batches
from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model, read_config
from thinkfast.ranking import rank_layers
from thinkfast.recipe import Recipe, parse_recipe
from thinkfast.sections import Watching
from thinkfast.stages import Stages, calibration_ids, make_corpus
from thinkfast.student.convert import convert
from thinkfast.student.plan import LayerPlan
from thinkfast.students import make_base, make_student

SHORT = {"tokens": 2000, "lr": 1e-3, "batch_tokens": 512, "save_every": 2}


def recipe(teacher: Path, **changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "teacher": {"path": str(teacher)},
        "problems": {"count": 4, "levels": [1]},
        "corpus": {"problems": 40, "levels": [1], "held_out": 8},
        "matrices": SHORT,
        "align": SHORT,
        "distill": SHORT,
        "sft": SHORT,
        "on_policy": {**SHORT, "prompts": 4, "max_tokens": 16, "slots": 4, "share": 0.7},
        "student": [{"name": "student"}],
        "sample": {"n": 2, "seconds": 30, "max_tokens": 16, "slots": [4], "trial_seconds": 0.05},
        "compare": {"grid": {"first": 0.0005, "last": 0.01, "points": 5}, "ks": [1, 2]},
    }
    return parse_recipe({**raw, **changes}, "test")


def student_of(given: Recipe, out: Path, watch: Watching = Watching(answers=0)) -> Path:  # noqa: B008 - it is frozen
    stages, source = Stages(lambda _: None), Path(given.teacher.path)
    corpus = make_corpus(given.corpus, source, out / "corpus", stages)
    base = None
    if given.base is not None:
        base = make_base(given.base, source, corpus, 8, out / "base", stages, watch)
    for student in given.student:
        make_student(student, source, corpus, 8, out / student.name, stages, watch, base)
    return out / given.student[0].name


def stages_of(directory: Path) -> list[str]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return list(dict.fromkeys(row["stage"] for row in rows))


def losses(directory: Path) -> list[tuple[str, int, float]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"], row["loss"]) for row in rows]


def test_stages_run_in_the_order_of_the_recipe(tiny_teacher: Path, tmp_path: Path) -> None:
    order = ["sft", "matrices", "on_policy", "align", "distill"]
    given = recipe(tiny_teacher, student=[{"name": "student", "attention": [1], "stages": order}])
    directory = student_of(given, tmp_path, Watching(answers=2))
    assert stages_of(directory) == order
    notes = (records.read_record(directory) or {})["notes"]
    assert notes["train"].keys() == set(order)
    assert notes["matrix_error"].keys() == notes["align_error"].keys() == {"0"}
    answers = [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in answers} == set(order)
    assert len({(row["stage"], row["step"], row["prompt"]) for row in answers}) == len(answers)
    assert not list(directory.glob("*.state"))
    load_model(directory)


def test_a_run_cut_anywhere_repeats_the_whole_one(tiny_teacher: Path, tmp_path: Path, monkeypatch) -> None:
    student = {"name": "student", "stages": ["matrices", "align", "on_policy", "distill", "sft"]}
    given = recipe(tiny_teacher, student=[student])
    whole = student_of(given, tmp_path / "whole")
    wanted, shown = losses(whole), students._shown

    class Cut(Exception):
        pass

    assert {stage for stage, *_ in wanted} == set(student["stages"])
    for place in range(2, len(wanted), 3):
        seen = []

        def cut(update, share, seen=seen, place=place):
            def show(*row):
                seen.append(row)
                if len(seen) == place:
                    raise Cut

            return show

        monkeypatch.setattr(students, "_shown", cut)
        try:
            student_of(given, tmp_path / "cut")
        except Cut:
            pass
        else:
            break
    monkeypatch.setattr(students, "_shown", shown)
    resumed = student_of(given, tmp_path / "cut")
    assert losses(resumed) == wanted
    mine, theirs = load_model(whole).state_dict(), load_model(resumed).state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_students_of_one_base_share_its_mixers_and_alignment(tiny_teacher: Path, tmp_path: Path) -> None:
    kept = [{"name": f"keep-{i}", "start": "base", "attention": [i], "stages": ["distill"]} for i in (0, 1)]
    given = recipe(tiny_teacher, base={"stages": ["matrices", "align"]}, student=kept, distill={**SHORT, "tokens": 0})
    student_of(given, tmp_path)
    assert stages_of(tmp_path / "base") == ["matrices", "align"]
    base, first = load_model(tmp_path / "base"), load_model(tmp_path / "keep-0")
    assert torch.equal(first.layers[1].mixer.in_proj.weight, base.layers[1].mixer.in_proj.weight)
    teacher = load_model(tiny_teacher)
    assert torch.equal(first.layers[0].mixer.q_proj.weight, teacher.layers[0].mixer.q_proj.weight)


def test_divergence_keeps_the_model_of_the_last_save(tiny_teacher: Path, tmp_path: Path, monkeypatch) -> None:
    from thinkfast.distill import trainer

    honest, calls = trainer.batch_loss, []

    def spoilt(*given: Any) -> Any:
        calls.append(1)
        loss = honest(*given)
        return loss * float("nan") if len(calls) == 5 else loss

    monkeypatch.setattr(trainer, "batch_loss", spoilt)
    given = recipe(tiny_teacher, student=[{"name": "student", "stages": ["distill"]}])
    with pytest.raises(records.Failed, match=r"diverged at step 5 .*the model is that of the last saved state"):
        student_of(given, tmp_path)
    saved = torch.load(tmp_path / "student" / "distill.state", weights_only=True)
    assert saved["counters"]["step"] == 4
    model = load_model(tmp_path / "student").state_dict()
    assert all(torch.equal(model[name], saved["model"][name]) for name in model)


def test_divergence_before_the_first_save_leaves_the_converted_model(tiny_teacher, tmp_path, monkeypatch) -> None:
    from thinkfast.distill import trainer

    monkeypatch.setattr(trainer, "batch_loss", lambda *given: given[2].head_weight.sum() * float("nan"))
    given = recipe(tiny_teacher, student=[{"name": "student", "stages": ["distill"]}])
    with pytest.raises(
        records.Failed, match=r"diverged at step 1 .*nothing was saved yet; the model is as it was conv"
    ):
        student_of(given, tmp_path)
    corpus = Corpus(tmp_path / "corpus")
    converted = convert(load_model(tiny_teacher), LayerPlan(()), calibration_ids(corpus.slice(0, len(corpus) - 8)), 0)
    mine, theirs = load_model(tmp_path / "student").state_dict(), converted.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_round_holds_the_students_answers_to_prompts_of_the_corpus(tiny_teacher: Path, tmp_path: Path) -> None:
    given = recipe(tiny_teacher)
    corpus = make_corpus(given.corpus, tiny_teacher, tmp_path / "corpus", Stages(lambda _: None))
    model, settings = load_model(tiny_teacher), given.student[0].on_policy
    source, _ = rounds.answered(lambda: model, corpus, settings, tmp_path / "rounds")
    stream, cursors = source(Cursor(0)), []
    while len(cursors) < 12:
        cursors.append(next(stream)[1])
    drawn = Corpus(tmp_path / "rounds" / "00000")
    own = [corpus.document(index) for index in range(len(corpus))]
    prompts = {tuple(prompt): completion for prompt, completion in own}
    documents = [drawn.document(index) for index in range(len(drawn))]
    assert all(tuple(prompt) in prompts for prompt, _ in documents)
    changed = [completion != prompts[tuple(prompt)] for prompt, completion in documents]
    assert any(changed)
    assert all(len(completion) <= 17 for (_, completion), new in zip(documents, changed, strict=True) if new)
    assert cursors[-1].epoch > 0
    # From any cursor the same batches follow, also in a round that is on disk already.
    again = source(cursors[4])
    for _ in range(3):
        batch, cursor = next(again)
        assert cursor in cursors
    assert batch.input_ids.dtype == torch.int64


def test_fine_tuning_reads_whole_documents_each_alone(tiny_teacher: Path, tmp_path: Path) -> None:
    given = recipe(
        tiny_teacher,
        student=[{"name": "student", "stages": ["sft"]}],
        sft={**SHORT, "tokens": 500, "batch_tokens": 1000},
    )
    directory = student_of(given, tmp_path)
    (row, *_) = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    corpus = Corpus(tmp_path / "corpus")
    training = corpus.slice(0, len(corpus) - 8)
    batch, _ = next(batches(training, Cursor(0), 1000, packed=True))
    student = convert(load_model(tiny_teacher), LayerPlan(()), calibration_ids(training), 0)
    total, count = 0.0, 0
    for start, end in pairwise(batch.bounds.tolist()):
        ids, learnt = batch.input_ids[:, start:end], batch.completion[0, start:end]
        with torch.no_grad():
            found = torch.nn.functional.cross_entropy(student(ids)[0, :-1], ids[0, 1:], reduction="none")
        total, count = total + float(found[learnt[1:]].sum()), count + int(learnt[1:].sum())
    assert len(batch.bounds) > 3
    assert row["tokens"] == batch.tokens
    assert row["loss"] == pytest.approx(total / count, rel=1e-5)


def test_on_policy_answers_have_to_fit(tiny_teacher: Path, tmp_path: Path) -> None:
    given = recipe(tiny_teacher, on_policy={**SHORT, "max_tokens": 5000})
    corpus = make_corpus(given.corpus, tiny_teacher, tmp_path / "corpus", Stages(lambda _: None))
    with pytest.raises(BadInput, match="max_tokens 5000: with the longest prompt that is"):
        rounds.check_room(corpus, given.student[0].on_policy, read_config(tiny_teacher))


@pytest.mark.parametrize("method", ["uniform", "kl", "kl-trained", "answers"])
def test_layers_are_ranked_and_a_student_reads_it(tiny_teacher: Path, tmp_path: Path, method: str) -> None:
    given = recipe(tiny_teacher, base={"stages": ["align"]})
    document = rank_layers(given, method, tmp_path / "ranks", lambda _: None)
    assert document == records.read_json(tmp_path / "ranks" / "ranking.json")
    assert document["choices"].keys() == {"1"}
    if method != "uniform":
        scores = {int(layer): score for layer, score in document["scores"].items()}
        best = max(scores, key=scores.get) if method == "answers" else min(scores, key=scores.get)
        assert document["order"][0] == best or len(set(scores.values())) == 1
    ranking = str(tmp_path / "ranks" / "ranking.json")
    reading = {"name": "student", "ranking": ranking, "keep": 1, "stages": ["distill"]}
    model = load_model(student_of(recipe(tiny_teacher, student=[reading]), tmp_path / "run"))
    kept = [index for index, kind in enumerate(model.config.layer_types) if kind == "attention"]
    assert kept == document["choices"]["1"]


def test_untrained_scores_are_the_divergence_with_one_layer_restored(tiny_teacher: Path, tmp_path: Path) -> None:
    from thinkfast.distill.trainer import evaluate_kl

    document = rank_layers(recipe(tiny_teacher), "kl", tmp_path, lambda _: None)
    teacher, base = load_model(tiny_teacher), load_model(tmp_path / "base")
    base.layers[1] = teacher.layers[1]
    corpus = Corpus(tmp_path / "corpus")
    unseen = corpus.slice(len(corpus) - 8, len(corpus))
    assert document["scores"]["1"] == pytest.approx(evaluate_kl(teacher, base, unseen), rel=1e-4)


def test_an_unknown_method_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="method is 'best', expected one of uniform, kl, kl-trained, answers"):
        rank_layers(recipe(tiny_teacher), "best", tmp_path)


def test_tensorboard_gets_every_row(tiny_teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: the extra dev, with `make test`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = recipe(tiny_teacher, student=[{"name": "student", "stages": ["distill"]}])
    directory = student_of(given, tmp_path, Watching(answers=0, tensorboard=True))
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("distill/loss")]
    wanted = [(step, loss) for _, step, loss in losses(directory)]
    assert [step for step, _ in logged] == [step for step, _ in wanted]
    assert np.allclose([value for _, value in logged], [value for _, value in wanted])


def test_without_tensorboard_there_is_one_line(tmp_path: Path, monkeypatch) -> None:
    from thinkfast.distill import track

    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadInput, match=r"TensorBoard is not installed, expected pip install 'thinkfast\[track\]'"):
        track.tensorboard(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(BadInput, match=r"wandb is not installed, expected pip install 'thinkfast\[wandb\]'"):
        track.weights_and_biases(tmp_path, "student")


def test_weights_and_biases_gets_every_row(tiny_teacher: Path, tmp_path: Path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: the extra dev, with `make test`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind))
    logged: list[dict[str, object]] = []
    honest = wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda run, row: (logged.append(row), honest(run, row))[1])
    given = recipe(tiny_teacher, student=[{"name": "student", "stages": ["distill"]}])
    directory = student_of(given, tmp_path, Watching(answers=0, wandb=True))
    wandb.finish()
    assert [(row["distill/step"], row["distill/loss"]) for row in logged] == [row[1:] for row in losses(directory)]
    assert list((directory / "wandb").glob("offline-run-*/*.wandb"))


def test_the_rate_is_tokens_over_the_seconds_since_this_process_began(monkeypatch) -> None:
    told: list[tuple[float, str]] = []
    clock = iter([1_000_000.0, 1_000_002.0, 1_000_010.0])
    monkeypatch.setattr(students.time, "monotonic", lambda: next(clock))
    show = students._shown(lambda done, words: told.append((done, words)), share=1e-3)
    # A resumed run has seen tokens before this process began: they are not in its rate.
    for step, tokens in ((51, 50_000), (52, 51_000), (60, 55_000)):
        show(step, tokens, 54_000, 1.25)
    assert told == [
        (50_000, "step 51, loss 1.2500"),
        (51_000, "step 52, loss 1.2500, 500 tokens/s, 50% of the peak"),
        (54_000, "step 60, loss 1.2500, 500 tokens/s, 50% of the peak"),
    ]


def test_a_resumed_run_tells_the_time_that_is_left(monkeypatch, capsys) -> None:
    clock = iter([0.0, 1.0, 11.0, 21.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bar("student: distill", 1000) as update:
        for done in (900, 910, 920):
            update(done, "words")
    assert capsys.readouterr().err == "student: distill: 92%, 80 s left words\n"


def test_progress_is_shown(tiny_teacher: Path, tmp_path: Path, monkeypatch) -> None:
    told: list[str] = []
    honest = progress.bar
    monkeypatch.setattr(progress, "bar", lambda title, total: (told.append(title), honest(title, total))[1])
    student_of(recipe(tiny_teacher, student=[{"name": "student", "stages": ["align"]}]), tmp_path)
    assert told == ["student: align"]
