"""From files to files: compare, adapt, plan, train-reward and reward, on completions made elsewhere."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from thinkfast import records, rewards
from thinkfast.cli import main
from thinkfast.data.wordproblems import generate
from thinkfast.errors import BadInput


def completions(path: Path, skill: float, pace: float, problems: int = 16, n: int = 8) -> Path:
    """Timed completions whose author is right with a chance that differs by problem; worked, right or wrong."""
    dice, rows = Random(path.name), []
    for place, made in enumerate(generate(4, problems, "held-out", [1])):
        chance = skill * (0.2 + 0.8 * (place % 4) / 3)
        # Of about the same length as a right one: a random model's log-probability knows nothing but the length.
        worked = made.solution.partition("####")[0].replace(" So", " ##", 1)
        texts = [
            made.solution if dice.random() < chance else f"{worked}#### {int(made.answer) + dice.choice([1, 2])}"
            for _ in range(n)
        ]
        starts = [(j * problems + place) * pace for j in range(n)]
        row = {"id": made.id, "problem": made.problem, "answer": made.answer, "completions": texts}
        rows.append(row | {"t_start": starts, "t_end": [start + pace for start in starts]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    slow, fast = completions(tmp_path / "slow.jsonl", 0.95, 0.02), completions(tmp_path / "fast.jsonl", 0.6, 0.01)
    return [str(slow), str(fast)]


def last(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_compare_tells_front_crossings_speed_ups_and_dollars(
    pair: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *pair, "--from", "0.01", "--to", "0.16", "--price", "2.5", "--json"]) == 0
    found = last(capsys)["frontier"]
    assert set(found["metrics"]) == {"coverage", "majority"}
    coverage = found["metrics"]["coverage"]
    assert {part["model"] for part in coverage["front"]} <= {"slow", "fast"}
    assert {row["level"] > 0 for row in coverage["speedups"]["fast"]} == {True}
    assert found["dollars"][0] == pytest.approx(1000 * 0.01 * 2.5 / 3600)
    assert main(["compare", *pair, "--price", "0"]) == 2
    assert "price = 0" in capsys.readouterr().err


def test_grading_and_reward_seconds_go_into_the_clock_when_asked(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every score took as long as drawing the sample: half as many are there at any time."""
    for place, source in enumerate(pair):
        rows = [
            records.RewardRow(json.loads(line)["id"], index, 0.0, "[]", 0.0199 / (place + 1))
            for line in Path(source).read_text().splitlines()
            for index in range(8)
        ]
        records.append_rows(tmp_path / f"r{place}", rows, records.RewardRow)
    scored = ["--rewards", str(tmp_path / "r0"), "--rewards", str(tmp_path / "r1")]
    command = ["compare", *pair, *scored, "--from", "0.04", "--to", "0.08", "--points", "2", "--json"]
    assert main(command) == 0
    without = last(capsys)
    assert main([*command, "--count", "rewards"]) == 0
    counted = last(capsys)
    assert counted["in_the_clock"] == ["sampling", "rewards"]
    assert without["by_time"]["slow"]["samples"] == [2, 4]
    assert counted["by_time"]["slow"]["samples"] == [1, 2]
    assert counted["by_time"]["fast"]["samples"] == [2, 4]
    assert main([*command, "--count", "grading"]) == 0
    graded = last(capsys)["by_time"]["slow"]["samples"]
    assert graded[1] <= 4
    assert main([*command, "--count", "naps"]) == 2
    assert "count 'naps': expected grading or rewards" in capsys.readouterr().err
    assert main(["compare", *pair, "--count", "rewards"]) == 2
    assert "--rewards is needed" in capsys.readouterr().err


def test_adapt_and_plan_tell_what_they_foresee(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapt", *pair, "--slots", "1", "--to", "0.1", "--json", "--out", str(tmp_path / "a.json")]) == 0
    found = last(capsys)
    assert found == records.read_json(tmp_path / "a.json")
    assert len(found["models"]["slow"]["adaptive"]) == len(found["seconds"])
    assert main(["plan", *pair, "--pilot", "4", "--ks", "2,8,32", "--json"]) == 0
    document = last(capsys)
    row = document["models"]["slow"]
    assert row["observed"]["k"] == [1, 2, 3, 4]  # of the four samples that the fit has not seen
    assert set(row["score"]["majority"]) == {"error", "inside"}
    assert row["score"]["coverage"]["error"] < 0.2
    assert [entry["k"] for entry in row["budgets"]] == sorted(entry["k"] for entry in row["budgets"])
    assert {entry["coverage"]["model"] for entry in document["best"]} <= {"slow", "fast"}
    assert document["best"][0]["seconds"] < 0.02 < document["best"][-1]["seconds"]
    assert row["coverage"]["low"][1] <= row["coverage"]["mean"][1] <= row["coverage"]["high"][1]
    assert row["seconds"][1] == pytest.approx(8 * 0.02, rel=0.01)
    assert main(["plan", *pair, "--pilot", "9"]) == 2
    assert "pilot = 9: expected 1 to 8" in capsys.readouterr().err


def test_a_verifier_is_trained_scores_and_ranks(
    pair: list[str], tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, scored = tmp_path / "verifier", tmp_path / "rewards"
    train = ["train-reward", str(tiny_teacher), pair[1], str(out), "--steps", "120", "--lr", "0.003", "--json"]
    assert main(train) == 0
    found = last(capsys)
    assert found["problems"] == 4
    assert found["verifier"]["auc_within"] > 0.9
    assert found["verifier"]["difference"]["low"] <= found["verifier"]["difference"]["high"]
    assert main(train) == 0
    assert last(capsys) == found
    assert main(["reward", str(out), pair[1], str(scored), "--json"]) == 0
    assert last(capsys)["samples"] == 128
    rows = records.read_rewards(scored)
    assert json.loads(rows[0].steps)[-1] == pytest.approx(rows[0].reward, abs=1e-4)
    command = ["compare", pair[1], "--rewards", str(scored), "--to", "0.08", "--ks", "1,4,8", "--json"]
    assert main(command) == 0
    curves = last(capsys)
    assert set(curves["by_k"]["fast"]) == {"coverage", "majority", "best_of_n", "weighted"}
    assert curves["by_k"]["fast"]["best_of_n"]["mean"][-1] > curves["by_k"]["fast"]["majority"]["mean"][-1]
    assert set(curves["by_time"]["fast"]) == {"coverage", "majority", "best_of_n", "weighted", "samples"}
    assert main(["compare", *pair, "--rewards", str(scored)]) == 2
    assert "1 directories of rewards for 2 sources" in capsys.readouterr().err


def test_rewards_go_on_where_they_were_cut_off(
    pair: list[str], tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards.train_file(tiny_teacher, Path(pair[1]), None, tmp_path / "v", {"steps": 1}, 0)
    monkeypatch.setattr(rewards, "ROWS_A_PART", 10)
    real, out = records.append_rows, tmp_path / "r"

    def cut(directory, rows, kind):
        if len(list(directory.glob("part-*"))) == 3:
            raise KeyboardInterrupt
        return real(directory, rows, kind)

    monkeypatch.setattr(records, "append_rows", cut)
    with pytest.raises(KeyboardInterrupt):
        rewards.score_file(tmp_path / "v", Path(pair[1]), None, out, "last", None)
    monkeypatch.setattr(records, "append_rows", real)
    assert rewards.score_file(tmp_path / "v", Path(pair[1]), None, out, "last", None)["samples"] == 128
    with pytest.raises(BadInput, match="'best': expected one of last, min, product, mean"):
        rewards.known_how("best")


def test_two_models_in_one_command_take_turns(
    pair: list[str], tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "other")
    command = ["sample", str(tiny_teacher), str(tmp_path / "other"), pair[0], str(tmp_path / "out"), "--n", "1"]
    assert main([*command, "--max-tokens", "5", "--slots", "4", "--seconds", "30", "--json"]) == 0
    assert {name: row["samples"] for name, row in last(capsys).items()} == {"teacher": 16, "other": 16}
    assert main([*command, "--prompt", "fancy"]) == 2
    assert "prompt 'fancy': expected one of plain, boxed" in capsys.readouterr().err
    assert main([*command, "--shots", "2"]) == 2
    assert "--shots-from" in capsys.readouterr().err


def test_overlap_is_told(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overlap", *pair]) == 0
    assert capsys.readouterr().out == f"16 of 16 problems of {pair[0]} stand in {pair[1]}\n"


def test_open_ended_prompts_have_best_of_n_curves(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From prompts without answers to curves of the best reward, with a small preference model of the stock layout."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: the extra dev, with `make test`"
    )
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tiny_teacher)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=len(tokenizer), num_labels=1, pad_token_id=0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"problem": f"Ava has {n} eggs."}) + "\n" for n in range(4)))
    drawn, scored, curves = tmp_path / "drawn", tmp_path / "scored", tmp_path / "curves.json"
    command = ["sample", str(tiny_teacher), str(prompts), str(drawn), "--n", "4", "--max-tokens", "8", "--slots", "4"]
    assert main(command) == 2
    assert "row 1: answer: expected text" in capsys.readouterr().err
    assert main([*command, "--open-ended"]) == 0
    assert main(["reward", str(tmp_path / "judge"), str(drawn), str(scored), "--problems", str(prompts)]) == 0
    asked = ["compare", str(drawn), "--problems", str(prompts), "--rewards", str(scored), "--open-ended", "--json"]
    span = ["--from", "0.0001", "--to", "60", "--ks", "1,2,4", "--price", "3", "--out", str(curves)]
    assert main([*asked, *span, "--count", "rewards"]) == 0
    found = last(capsys)
    assert found == records.read_json(curves)
    rewards = records.read_rewards(scored)
    best = [max(r.reward for r in rewards if r.problem_id == str(n)) for n in range(1, 5)]
    assert found["by_time"]["drawn"]["reward"]["mean"][-1] == pytest.approx(sum(best) / 4)
    assert found["by_k"]["drawn"]["reward"]["mean"][-1] == pytest.approx(sum(best) / 4)
    one, two, four = found["by_k"]["drawn"]["reward"]["mean"]
    assert one <= two + 1e-9 <= four + 2e-9
    assert (found["in_the_clock"], len(found["dollars"])) == (["sampling", "rewards"], 40)
