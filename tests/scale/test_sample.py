import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from thinkfast import records
from thinkfast.data.chat import named_prompt, render_prompt
from thinkfast.data.problems import Problem, dump_problems
from thinkfast.data.tokenizer import load_tokenizer
from thinkfast.data.wordproblems import generate
from thinkfast.engine import Engine, Sample, SamplingParams
from thinkfast.errors import BadInput
from thinkfast.model import checkpoint
from thinkfast.model.checkpoint import load_model, save_model
from thinkfast.model.decoder import Decoder
from thinkfast.recipe import SampleSettings
from thinkfast.scale.adaptive import LiveVotes
from thinkfast.scale.sample import sample_model

SETTINGS = SampleSettings(n=3, seconds=60.0, temperature=0.9, max_tokens=20, slots=(4,), seed=11)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return [Problem(made.id, made.problem, made.answer) for made in generate(3, 5, "held-out", [1])]


def test_rows_are_what_the_engine_draws(tiny_teacher: Path, problems: list[Problem], tmp_path: Path) -> None:
    shares: list[float] = []
    drawn = sample_model(tiny_teacher, problems, SETTINGS, tmp_path, "t", lambda share, _: shares.append(share))
    tokenizer = load_tokenizer(tiny_teacher)
    prompts = [render_prompt(tokenizer, problem.problem) for problem in problems]
    params = SamplingParams(max_tokens=20, temperature=0.9, seed=11)
    expected = Engine(load_model(tiny_teacher), slots=4).sample(prompts, 3, params)
    rows = {(row.problem_id, row.sample_index): row for row in records.read_samples(tmp_path)}
    assert len(rows) == drawn.samples == 15
    for problem, wanted in zip(problems, expected, strict=True):
        for index, sample in enumerate(wanted):
            row = rows[problem.id, index]
            assert row.text == tokenizer.decode(list(sample.token_ids))
            assert row.token_count == len(sample.token_ids)
            assert row.finish_reason == sample.finish_reason
            assert row.logprob_sum == pytest.approx(sample.logprob_sum, rel=1e-5)
            assert (row.seed, row.model) == (11, "t")
    assert drawn.tokens == sum(row.token_count for row in rows.values())
    assert drawn.seconds == max(row.t_end for row in rows.values())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_finished_directory_is_not_drawn_again(tiny_teacher: Path, problems: list[Problem], tmp_path: Path) -> None:
    first = sample_model(tiny_teacher, problems, SETTINGS, tmp_path)
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    assert sample_model(tiny_teacher, problems, SETTINGS, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")} == parts
    with pytest.raises(BadInput, match=r"was made with temperature = 0\.9, not 0\.5"):
        sample_model(tiny_teacher, problems, SETTINGS.model_copy(update={"temperature": 0.5}), tmp_path)
    with pytest.raises(BadInput, match="was made from another problems"):
        sample_model(tiny_teacher, problems[1:], SETTINGS, tmp_path)


def test_an_interrupt_keeps_what_was_finished_and_the_clock_goes_on(
    tiny_teacher: Path, problems: list[Problem], tmp_path: Path
) -> None:
    def interrupt(share: float, text: str) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=str(tmp_path)):
        sample_model(tiny_teacher, problems, SETTINGS, tmp_path, update=interrupt)
    kept = records.read_samples(tmp_path)
    assert 7 <= len(kept) < 15
    spent = records.read_json(tmp_path / "run.json")["notes"]["clock"]
    assert spent >= max(row.t_end for row in kept) - 0.001
    sample_model(tiny_teacher, problems, SETTINGS, tmp_path)
    rows = records.read_samples(tmp_path)
    assert rows[: len(kept)] == kept
    assert min(row.t_start for row in rows[len(kept) :]) >= spent
    record = records.read_json(tmp_path / "run.json")
    assert record["notes"]["resumes"] == [{"samples": len(kept), "clock": spent}]
    whole = tmp_path / "whole"
    sample_model(tiny_teacher, problems, SETTINGS, whole)
    texts = {(row.problem_id, row.sample_index): row.text for row in rows}
    assert texts == {(row.problem_id, row.sample_index): row.text for row in records.read_samples(whole)}


def test_samples_without_finite_logits_are_not_stored(
    tiny_teacher: Path, problems: list[Problem], tmp_path: Path
) -> None:
    """A word of one problem breaks the model; the others are drawn as if nothing were the matter."""
    sound = load_model(tiny_teacher)
    broken = Decoder(replace(sound.config, tie_word_embeddings=False))
    broken.load_state_dict({**sound.state_dict(), "lm_head.weight": sound.embed_tokens.weight})
    tokenizer = load_tokenizer(tiny_teacher)
    words = [set(tokenizer.encode(problem.problem)) for problem in problems]
    only = next(iter(words[2] - set().union(*words[:2], *words[3:])))
    with torch.no_grad():
        broken.embed_tokens.weight[only] = float("nan")
    save_model(broken, tmp_path / "broken", tokenizer_from=tiny_teacher)
    brief = SETTINGS.model_copy(update={"temperature": 0.0})
    told: list[str] = []
    sample_model(tmp_path / "broken", problems, brief, tmp_path / "a", update=lambda _, text: told.append(text))
    rows = {(row.problem_id, row.sample_index): row.text for row in records.read_samples(tmp_path / "a")}
    sample_model(tiny_teacher, problems, brief, tmp_path / "b")
    want = {(row.problem_id, row.sample_index): row.text for row in records.read_samples(tmp_path / "b")}
    assert rows == {pair: text for pair, text in want.items() if pair[0] != problems[2].id}
    assert records.read_json(tmp_path / "a" / "run.json")["notes"]["failed"] == 3
    assert told[-1].endswith("3 failed: logits not finite")
    with pytest.raises(records.Failed, match="broken: the logits of all 3 samples were not finite"):
        sample_model(tmp_path / "broken", [problems[2]], brief, tmp_path / "c")


def test_a_model_that_changes_meanwhile_is_refused(
    tiny_teacher: Path, problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_teacher, model)
    load = checkpoint.load_model

    def swapped(path: Path) -> Decoder:
        loaded = load(path)
        with torch.no_grad():
            loaded.norm.weight.mul_(2)
        save_model(loaded, path, tokenizer_from=tiny_teacher)
        return loaded

    monkeypatch.setattr(checkpoint, "load_model", swapped)
    with pytest.raises(BadInput, match="model: changed while it was being read"):
        sample_model(model, problems, SETTINGS, tmp_path / "out")


PROGRAM = """
import os, signal, sys, time, torch
import pyarrow.parquet  # what the first rows are written with: to import it takes as long as the samples
from pathlib import Path
from thinkfast.data.problems import load_problems
from thinkfast.recipe import SampleSettings
from thinkfast.scale.adaptive import LiveVotes
from thinkfast.scale import sample

def deadly(share, text):
    while share > 0.1 and not list(Path(out).glob("part-*.parquet")):
        time.sleep(0.01)
    if share > 0.1:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
sample.FLUSH_SECONDS = 0.05
model, problems, out, settings = sys.argv[1:]
settings = SampleSettings.model_validate_json(settings)
sample.sample_model(Path(model), load_problems(problems), settings, Path(out), update=deadly)
"""


def test_killed_it_goes_on_and_the_lost_time_counts(
    tiny_teacher: Path, problems: list[Problem], tmp_path: Path
) -> None:
    file, out = tmp_path / "problems.jsonl", tmp_path / "out"
    file.write_text(dump_problems(problems))
    settings = SETTINGS.model_copy(update={"n": 2000, "seconds": 1.0})
    command = [sys.executable, "-c", PROGRAM, str(tiny_teacher), str(file), str(out), settings.model_dump_json()]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    kept = records.read_samples(out)
    spent = max([0.0, *(row.t_end for row in kept)])
    drawn = sample_model(tiny_teacher, problems, settings, out)
    rows = records.read_samples(out)
    assert rows[: len(kept)] == kept
    assert drawn.samples == len(rows) > len(kept)
    assert min(row.t_start for row in rows[len(kept) :]) >= spent
    assert 1.0 <= drawn.seconds < 3.0


@pytest.mark.parametrize("cut", [False, True])
def test_a_deadline_between_two_samples_is_spent_all_the_same(
    tiny_teacher: Path, problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    """Every running sample ends, the clock runs out before the next one starts: no row reaches the deadline."""
    settings = SETTINGS.model_copy(update={"seconds": 50.0})

    def stream(self: Engine, *_: object) -> Iterator[tuple[int, int, Sample]]:
        for problem in range(5):
            yield problem, 0, Sample((5, 6), "stop", 0.0, 49.9 + 0.01 * problem, -1.0)
        if cut:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "stream", stream)
        if cut:
            with pytest.raises(KeyboardInterrupt):
                sample_model(tiny_teacher, problems, settings, tmp_path)
            patch.setattr(Engine, "stream", lambda *_: iter(()))
        assert sample_model(tiny_teacher, problems, settings, tmp_path).seconds == 50.0
    assert sample_model(tiny_teacher, problems, settings, tmp_path).seconds == 50.0
    assert records.read_json(tmp_path / "run.json")["notes"]["drawn"]["seconds"] == 50.0


def test_a_decided_problem_stops_and_its_turns_go_to_the_others(
    tiny_teacher: Path, problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real engine draws; what its random texts would vote for is made up, by the question."""
    sides = iter(range(10**6))

    def said(self: LiveVotes, problem: int, text: str) -> None:
        real(self, problem, "#### 7" if problem in (0, 3) else f"#### {next(sides)}")

    real = LiveVotes.count
    monkeypatch.setattr(LiveVotes, "count", said)
    settings = SETTINGS.model_copy(update={"n": 12, "stop_error": 0.1})
    drawn = sample_model(tiny_teacher, problems, settings, tmp_path / "a")
    rows = records.read_samples(tmp_path / "a")
    counts = {problem.id: sum(row.problem_id == problem.id for row in rows) for problem in problems}
    # Five equal votes decide; what is in the slots by then is finished and counts.
    assert {counts[problems[place].id] for place in (1, 2, 4)} == {12}
    assert all(5 <= counts[problems[place].id] <= 9 for place in (0, 3))
    assert drawn.seconds == max(row.t_end for row in rows)  # it ended by itself, not by the clock
    assert records.read_json(tmp_path / "a" / "run.json")["notes"]["stopped"] == 2
    # A sample is the same function of seed, prompt and index as without stopping.
    sample_model(tiny_teacher, problems, SETTINGS.model_copy(update={"n": 12}), tmp_path / "b")
    texts = {(row.problem_id, row.sample_index): row.text for row in records.read_samples(tmp_path / "b")}
    assert all(texts[row.problem_id, row.sample_index] == row.text for row in rows)
    with pytest.raises(BadInput, match="was made with stop_error"):
        sample_model(tiny_teacher, problems, SETTINGS.model_copy(update={"n": 12}), tmp_path / "a")


def test_an_interrupted_adaptive_run_remembers_its_votes(
    tiny_teacher: Path, problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LiveVotes.count
    monkeypatch.setattr(LiveVotes, "count", lambda self, problem, text: real(self, problem, "#### 7"))

    def interrupt(share: float, text: str) -> None:
        if text.startswith("26 "):
            raise KeyboardInterrupt

    settings = SETTINGS.model_copy(update={"n": 50, "stop_error": 0.1})
    with pytest.raises(KeyboardInterrupt):
        sample_model(tiny_teacher, problems, settings, tmp_path, update=interrupt)
    sample_model(tiny_teacher, problems, settings, tmp_path)
    assert len(records.read_samples(tmp_path)) < 5 * 10


def test_the_clock_ends_it(tiny_teacher: Path, problems: list[Problem], tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"n": 100_000, "seconds": 1.0, "max_tokens": 200})
    cut: list[records.SampleRow] = []
    for _ in range(5):  # all chains are equally long here: now and then time is over just when four have ended
        shutil.rmtree(tmp_path, ignore_errors=True)
        drawn = sample_model(tiny_teacher, problems, settings, tmp_path)
        rows = records.read_samples(tmp_path)
        cut = [row for row in rows if row.finish_reason == "deadline"]
        if cut:
            break
    assert 0 < len(cut) <= 4
    assert 1.0 <= drawn.seconds < 4.0
    assert all(row.t_end < 1.0 for row in rows if row.finish_reason != "deadline")
    counts = [sum(row.problem_id == problem.id for row in rows) for problem in problems]
    assert max(counts) - min(counts) <= 1
    assert records.read_json(tmp_path / "run.json")["status"] == "complete"


def test_the_fastest_slots_are_chosen_once(tiny_teacher: Path, problems: list[Problem], tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"slots": (1, 5), "trial_seconds": 0.2})
    sample_model(tiny_teacher, problems, settings, tmp_path)
    slots = json.loads((tmp_path / "run.json").read_text())["notes"]["slots"]
    rates = slots["tokens_per_second"]
    assert set(rates) == {"1", "5"}
    assert rates[str(slots["chosen"])] == max(rates.values())
    assert all(rate > 0 for rate in rates.values())


def test_an_unusable_model_is_named_and_nothing_written(
    tiny_teacher: Path, problems: list[Problem], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"empty/config\.json"):
        sample_model(tmp_path / "empty", problems, SETTINGS, tmp_path / "out")
    shutil.copytree(tiny_teacher, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(BadInput, match=r"mute/tokenizer\.json"):
        sample_model(tmp_path / "mute", problems, SETTINGS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_prompt_is_kept_and_changes_what_is_asked(
    tiny_teacher: Path, problems: list[Problem], tmp_path: Path
) -> None:
    prompt = named_prompt("plain", [("1+1?", "#### 2")], shots=1)
    sample_model(tiny_teacher, problems, SETTINGS, tmp_path, prompt=prompt)
    kept = records.read_json(tmp_path / "run.json")["settings"]["prompt"]
    assert kept == {"name": "plain", "system": None, "user": "{problem}", "shots": [["1+1?", "#### 2"]]}
    with pytest.raises(BadInput, match="was made with prompt"):
        sample_model(tiny_teacher, problems, SETTINGS, tmp_path)


LOOP = """
import sys, torch
from pathlib import Path
from thinkfast.data.problems import load_problems
from thinkfast.recipe import SampleSettings
from thinkfast.scale.adaptive import LiveVotes
from thinkfast.scale import sample

torch.set_num_threads(1)
sample.FLUSH_SECONDS = 0.02
model, problems, out, settings = sys.argv[1:]
sample.sample_model(Path(model), load_problems(problems), SampleSettings.model_validate_json(settings), Path(out))
"""


@pytest.mark.slow
def test_killed_at_any_instant_nothing_is_lost_or_doubled(
    tiny_teacher: Path, problems: list[Problem], tmp_path: Path
) -> None:
    """scripts/kill_sampling.py does the same a hundred times."""
    file, out = tmp_path / "problems.jsonl", tmp_path / "out"
    file.write_text(dump_problems(problems))
    settings = SETTINGS.model_copy(update={"n": 100, "seconds": 600.0})
    command = [sys.executable, "-c", LOOP, str(tiny_teacher), str(file), str(out), settings.model_dump_json()]
    random = Random(1)
    held: dict[tuple[str, int], str] = {}
    for _ in range(4):
        with subprocess.Popen(command) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0 + random.random() * 3)
            process.kill()
        rows = records.read_samples(out) if out.exists() else []
        now = {(row.problem_id, row.sample_index): row.text for row in rows}
        assert held.items() <= now.items()
        held = now
    sample_model(tiny_teacher, problems, settings, out)
    sample_model(tiny_teacher, problems, settings, tmp_path / "whole")
    rows, whole = records.read_samples(out), records.read_samples(tmp_path / "whole")
    assert len(rows) == 500
    assert {(r.problem_id, r.sample_index, r.text) for r in rows} == {
        (r.problem_id, r.sample_index, r.text) for r in whole
    }
