"""Several processes: the same run as one, killed and taken up by another number of them, in float32 and bfloat16."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from thinkfast import ranks
from thinkfast.cli import main
from thinkfast.data.corpus import Corpus
from thinkfast.data.tokenizer import load_tokenizer, save_word_tokenizer
from thinkfast.data.wordproblems import generate
from thinkfast.distill import parallel
from thinkfast.model.checkpoint import load_model, save_model
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.ranks import Team
from thinkfast.student.convert import convert
from thinkfast.student.plan import LayerPlan

# Small rates: AdamW moves a weight whose gradient is nothing but rounding as far as any other, and the number of
# processes changes the rounding.
SETTINGS = {
    "corpus.held_out": 4,
    "align.lr": 1e-4,
    "distill.lr": 1e-4,
    "align.tokens": 2000,
    "align.batch_tokens": 200,
    "align.accumulate": 3,
    "align.save_every": 2,
    "distill.tokens": 16000,
    "distill.batch_tokens": 200,
    "distill.accumulate": 3,
    "distill.save_every": 2,
    "watch.answers": 0,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher whose gradients stand well above rounding, in sizes that the kernels for training take, and problems
    with solutions."""
    root = tmp_path_factory.mktemp("team")
    save_word_tokenizer(root / "words")
    words = load_tokenizer(root / "words")
    config = DecoderConfig(words.vocab_size, 32, 48, 2, 1, 32, (ATTENTION,) * 3, eos_token_ids=(words.eos_id,))
    torch.manual_seed(1)
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)
    save_model(model, root / "teacher", tokenizer_from=root / "words")
    problems = generate(3, 40, "train", [1])
    rows = [{"id": p.id, "problem": p.problem, "answer": p.answer, "solution": p.solution} for p in problems]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def arguments(place: Path, out: Path, **changes: object) -> list[str]:
    words = ["distill", str(place / "teacher"), str(place / "train.jsonl"), str(out), "--attention", "1"]
    for key, value in {**SETTINGS, **changes}.items():
        words += ["--set", f"{key.replace('__', '.')}={value}"]
    return words


def launch(processes: int, words: list[str]) -> subprocess.Popen[str]:
    """`torchrun`."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*run, "-m", "thinkfast", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_all(running: subprocess.Popen[str]) -> None:
    """Kills the launcher and its workers, which have sessions of their own, and waits for their ends."""
    workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    for process in (str(running.pid), *workers):
        os.kill(int(process), signal.SIGKILL)
    running.communicate()


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "student" / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(got: list[dict], want: list[dict]) -> None:
    assert [(row["stage"], row["step"], row["tokens"]) for row in got] == [
        (row["stage"], row["step"], row["tokens"]) for row in want
    ]
    for name in ("loss", "grad_norm", "lr"):
        assert [row[name] for row in got] == pytest.approx([row[name] for row in want], rel=2e-6)


def test_two_processes_are_one_and_a_killed_run_goes_on_with_one_or_three(place, tmp_path):
    assert main(arguments(place, tmp_path / "one")) == 0
    whole = rows(tmp_path / "one")

    running = launch(2, arguments(place, tmp_path / "two"))
    state = tmp_path / "two" / "student" / "distill.state.d"
    while not list(state.glob("step-*")):
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.01)
    kill_all(running)
    assert running.returncode == -signal.SIGKILL
    saved = int(max(state.glob("step-*")).name.removeprefix("step-"))
    before = rows(tmp_path / "two")
    done = sum(row["stage"] == "align" for row in before) + saved
    assert_same_run(before[:done], whole[:done])
    shutil.copytree(tmp_path / "two", tmp_path / "alone")

    resumed = launch(3, arguments(place, tmp_path / "two"))
    told, _ = resumed.communicate()
    assert resumed.returncode == 0, told
    assert Path(os.devnull).is_char_device()
    assert main(arguments(place, tmp_path / "alone")) == 0
    for name in ("two", "alone"):
        after = rows(tmp_path / name)
        assert after[:done] == before[:done]  # with their seconds: those steps were not run again
        assert_same_run(after, whole)
        assert not list((tmp_path / name / "student").glob("*.state*"))
        mine, theirs = (load_model(tmp_path / which / "student") for which in ("one", name))
        ids = torch.arange(24)[None]
        assert torch.allclose(mine(ids), theirs(ids), atol=1e-3)


# Fine-tuning first, so that packed documents are trained together, too.
ON_POLICY = {
    "student.0.stages": "['sft', 'on_policy']",
    "sft.tokens": 2000,
    "sft.lr": 1e-5,
    "sft.batch_tokens": 250,
    "sft.accumulate": 3,
    "on_policy.tokens": 9_000,
    "on_policy.lr": 1e-4,
    "on_policy.batch_tokens": 250,
    "on_policy.accumulate": 2,
    "on_policy.save_every": 2,
    "on_policy.prompts": 7,
    "on_policy.share": 0.8,
    "on_policy.max_tokens": 24,
}


def answers_of(student: Path) -> list[str]:
    """What every round that is on disk holds."""
    return [Corpus(path.parent).identity for path in sorted(student.glob("on_policy/*/corpus.json"))]


def test_two_processes_answer_as_one_and_a_killed_run_goes_on_alone(place, tmp_path):
    changes = {key.replace(".", "__"): value for key, value in ON_POLICY.items()}
    assert main(arguments(place, tmp_path / "one", **changes)) == 0
    whole = rows(tmp_path / "one")

    running = launch(2, arguments(place, tmp_path / "two", **changes))
    student = tmp_path / "two" / "student"
    while not ((student / "on_policy" / "00002" / "corpus.json").exists() and list(student.glob("*.state.d/step-*"))):
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.01)
    kill_all(running)
    assert running.returncode == -signal.SIGKILL
    saved = int(max(student.glob("on_policy.state.d/step-*")).name.removeprefix("step-"))
    before = rows(tmp_path / "two")
    assert saved >= 2
    done = sum(row["stage"] == "sft" for row in before) + saved
    assert done > saved + 2
    assert_same_run(before[:done], whole[:done])
    drawn = answers_of(student)
    assert len(drawn) >= 3
    assert len(set(drawn)) == len(drawn)

    assert main(arguments(place, tmp_path / "two", **changes)) == 0
    after = rows(tmp_path / "two")
    assert after[:done] == before[:done]
    assert_same_run(after, whole)
    once = answers_of(tmp_path / "one" / "student")
    assert answers_of(student) == once
    assert drawn == once[: len(drawn)]


@pytest.fixture
def team_of_one(monkeypatch: pytest.MonkeyPatch):
    """What torchrun gives a single process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**values, "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setenv(name, str(value))


def test_bfloat16_keeps_float32_weights_behind_it_and_recomputes(place, tmp_path, team_of_one):
    short = {"distill__tokens": 3000, "align__tokens": 600}
    assert main(arguments(place, tmp_path / "single", **short)) == 0
    half = {"compute__dtype": "bfloat16", "compute__recompute": "true"}
    assert main(arguments(place, tmp_path / "half", **short, **half)) == 0
    want, got = rows(tmp_path / "single"), rows(tmp_path / "half")
    assert [row["tokens"] for row in got] == [row["tokens"] for row in want]
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in want], rel=0.05)
    assert [row["loss"] for row in got] != [row["loss"] for row in want]
    student = load_model(tmp_path / "half" / "student")
    weight = student.embed_tokens.weight
    assert not torch.equal(weight, weight.bfloat16().float())


def test_shards_hold_the_masters_in_float32_and_the_teacher_in_half(place, team_of_one):
    teacher = load_model(place / "teacher")
    student = convert(teacher, LayerPlan((1,)))
    with ranks.gathered() as team:
        assert (team.rank, team.size, team.together) == (0, 1, True)
        parallel.shard(team, teacher, student, torch.bfloat16)
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
        hidden = team.call(lambda: student.hidden(torch.arange(9)[None]))
        assert hidden.dtype == torch.bfloat16
        whole = parallel.whole(team, student)
    assert whole is not None
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    assert not ranks.current().together


def test_a_state_of_one_process_is_not_taken_up_by_a_team(place, tmp_path, team_of_one, monkeypatch, capsys):
    with monkeypatch.context() as alone:
        alone.delenv("TORCHELASTIC_RUN_ID")
        assert main(arguments(place, tmp_path / "out", distill__tokens=1500)) == 0
    record = tmp_path / "out" / "student" / "run.json"
    document = json.loads(record.read_text()) | {"status": "running"}
    record.write_text(json.dumps(document))
    torch.save({}, tmp_path / "out" / "student" / "align.state")
    assert main(arguments(place, tmp_path / "out", distill__tokens=1500)) == 2
    assert "align.state: was saved without torchrun" in capsys.readouterr().err


def test_bfloat16_without_torchrun_is_refused(place, tmp_path, capsys):
    assert main(arguments(place, tmp_path / "out", compute__dtype="bfloat16")) == 2
    assert "compute.dtype bfloat16: needs torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "step"), [(1, 3), (2, 4), (2, 5), (3, 2), (4, 9)])
def test_every_batch_is_dealt_once_and_all_processes_compute_equally_often(size, step):
    batches = list(range(step))
    dealt = [Team(rank, size).deal(batches) for rank in range(size)]
    assert sorted(batch for mine in dealt for batch, weight in mine if weight) == batches
    assert len({len(mine) for mine in dealt}) == 1


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    model = convert(Decoder(DecoderConfig(50, 32, 48, 4, 2, 8, (ATTENTION,) * 3)), LayerPlan((1,)))
    ids = torch.randint(0, 50, (2, 20))
    found = []
    for model.recompute in (False, True):
        model.zero_grad()
        model(ids).logsumexp(-1).sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for kept, again in zip(*found, strict=True):
        assert torch.equal(kept, again)
