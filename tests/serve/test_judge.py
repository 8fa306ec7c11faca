"""A reward model that ranks chains while they are drawn."""

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest

from thinkfast.cli import main
from thinkfast.data.chat import render_prompt
from thinkfast.errors import BadInput
from thinkfast.scale.verifier import Example, load_verifier, score_examples
from thinkfast.serve.judge import TRIAL, Judge, JudgeFailed, open_judge

ASK: dict[str, Any] = {"model": "talker", "messages": [{"role": "user", "content": "Ada has 3 pens."}], "seed": 3}
Serve = Callable[..., str]


@pytest.fixture(scope="module")
def judge(contrary: Path) -> Iterator[Judge]:
    opened = open_judge(contrary)
    yield opened
    opened.close()


def ask(address: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{address}/v1/chat/completions", json={**ASK, **body}, timeout=120)


def test_its_scores_are_the_verifiers(contrary: Path, judge: Judge) -> None:
    problem, texts = "Ada has 3 pens.", ["Notes#### 7", "NotesNotes#### 8", "Notes#### 8"]
    found = asyncio.run(judge.scores(problem, texts))
    verifier, tokenizer = load_verifier(contrary)
    prompt = tuple(render_prompt(tokenizer, problem))
    examples = [Example(prompt, (*tokenizer.encode(text), tokenizer.eos_id), False) for text in texts]
    want = {place: total for place, total, _, _ in score_examples(verifier, examples, tokenizer.pad_id)}
    assert found == pytest.approx([want[0], want[1], want[2]], rel=1e-4)
    assert found[2] - found[0] == pytest.approx(math.log(999), abs=1e-2)


def test_it_overrules_the_many(serve: Serve, judge: Judge) -> None:
    address = serve(judge=judge)
    found = {}
    for strategy in ("majority", "weighted", "best_of_n", None):
        body = {"strategy": strategy, "n": 40, "min_samples": 40, "return_samples": True}
        answer = ask(address, **body)
        assert answer.status_code == 200, answer.text
        found[strategy] = answer.json()["thinkfast"] if strategy else None
        if strategy is None:
            assert "thinkfast" not in answer.json(), "no vote was asked for"
    assert {name: told["answer"] for name, told in found.items() if told} == {
        "majority": "7",
        "weighted": "8",
        "best_of_n": "8",
    }
    assert [found[name]["samples"] for name in ("majority", "weighted", "best_of_n")] == [40] * 3
    votes = {row["answer"]: row["votes"] for row in found["weighted"]["votes"]}
    assert votes["7"] > votes["8"], "more chains said otherwise"
    assert found["weighted"]["confidence"] > 0.9
    assert all(chain["score"] < 0 for chain in found["weighted"]["chains"]), "log-probabilities"
    assert ask(address, time_budget=30, n=9).json()["thinkfast"]["strategy"] == "weighted", "unless told otherwise"


def test_a_judge_that_never_comes_back_costs_no_answer(serve: Serve) -> None:
    free, asked = threading.Event(), threading.Event()
    free.set()

    def score(problem: str, texts: Sequence[str]) -> list[float]:
        asked.set()
        assert free.wait(120)
        return [1.0] * len(texts)

    stuck = Judge(score, soft=False)
    address = serve(judge=stuck)
    free.clear()
    asked.clear()
    try:
        told = ask(address, strategy="weighted", n=20, time_budget=4).json()["thinkfast"]
        assert asked.is_set()
        assert told["answer"] in ("7", "8"), "better the model's own certainty than nothing"
        assert told["samples"] > 0
    finally:
        free.set()
        stuck.close()


@pytest.mark.parametrize(("outcome", "told"), [(math.nan, "a score is nan"), ("x", "ValueError: could not convert")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_judge_that_fails(serve: Serve, outcome: Any, told: str, stream: bool) -> None:
    broken = Judge(lambda problem, texts: [1.0 if texts == TRIAL[1:] else outcome for _ in texts], soft=False)
    answer = ask(serve(judge=broken), strategy="best_of_n", n=3, stream=stream)
    broken.close()
    assert answer.status_code == (200 if stream else 503)
    error = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: ")) if stream else answer.json()
    assert error["error"]["code"] == "reward_failed"
    assert told in error["error"]["message"]


def test_the_time_it_needs_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now, cost = [0.0], [0.5]

    def score(problem: str, texts: Sequence[str]) -> list[float]:
        now[0] += cost[0] * sum(len(problem) + len(text) + 1 for text in texts)
        return [0.0] * len(texts)

    monkeypatch.setattr("thinkfast.serve.judge.time", SimpleNamespace(monotonic=lambda: now[0]))
    judge = Judge(score, soft=False)
    assert judge.pace == pytest.approx(0.5)
    assert judge.seconds("abc", ["defg", "hi"]) == pytest.approx(0.5 * (8 + 6))
    cost[0] = 0.001
    for _ in range(60):
        asyncio.run(judge.scores("abc", ["defg"]))
    assert judge.pace == pytest.approx(0.001, rel=1e-3)
    judge.pace = 0.001
    assert judge.batch("abc", ["defg"] * 100) == 25, "a fifth of a second"
    assert judge.batch("abc", ["defg"]) == 1
    judge.close()
    with pytest.raises(JudgeFailed):
        asyncio.run(judge.scores("abc", ["defg"]))


def test_solve_with_a_reward(talker: Path, contrary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["solve", str(talker), "Ada has 3 pens.", "--budget", "60s", "--n", "40", "--slots", "8", "--json"]
    assert main([*line, "--reward", str(contrary)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["answer"], found["strategy"], found["samples"]) == ("8", "weighted", 40)
    assert found["chain"].endswith("#### 8")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--reward", "nowhere"], "nowhere: no such reward model directory"),
        (["--reward", "."], "config.json"),
        (["--reward", ".", "--strategy", "majority"], "'majority' uses no reward model, expected best_of_n or weigh"),
    ],
)
def test_bad_input(
    options: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["solve", "bundled", "x", *options]) == 2
    assert told in capsys.readouterr().err
    with pytest.raises(BadInput, match="no such reward model directory"):
        open_judge(tmp_path / "none")
