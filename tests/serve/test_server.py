"""The server as the official `openai` client sees it."""

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from thinkfast.serve.app import Limits

ASK = [{"role": "user", "content": "Ada has 3 pens. How many?"}]
SAID = re.compile(r"(Notes)+#### [78]")


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none needed", max_retries=0, timeout=60)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["talker", "rambler"]


def test_a_chat(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="talker", messages=ASK, n=3, seed=5, max_tokens=500)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    for choice in found.choices:
        assert choice.message.role == "assistant"
        assert SAID.fullmatch(choice.message.content or "")
        assert choice.finish_reason == "stop"
        assert choice.logprobs is None
    said = sum((choice.message.content or "").count("Notes") + 2 for choice in found.choices)
    assert found.usage is not None
    assert found.usage.completion_tokens == said
    assert found.usage.total_tokens == found.usage.prompt_tokens + said
    again = client.chat.completions.create(model="talker", messages=ASK, n=3, seed=5, max_tokens=500)
    assert [c.message.content for c in again.choices] == [c.message.content for c in found.choices]
    other = client.chat.completions.create(model="talker", messages=ASK, n=3, seed=6, max_tokens=500)
    assert [c.message.content for c in other.choices] != [c.message.content for c in found.choices]
    assert len({c.message.content for c in found.choices}) > 1


def test_max_tokens_and_greedy(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="rambler", messages=ASK, max_completion_tokens=4, temperature=0)
    assert found.choices[0].message.content == "NotesNotesNotesNotes"
    assert found.choices[0].finish_reason == "length"


def test_streamed_is_what_is_not_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="talker", messages=ASK, n=2, seed=11, max_tokens=500)
    texts: dict[int, str] = {0: "", 1: ""}
    ends: dict[int, str] = {}
    usage = None
    for chunk in client.chat.completions.create(
        model="talker", messages=ASK, n=2, seed=11, max_tokens=500, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert ends == {0: "stop", 1: "stop"}
    assert usage == whole.usage


def test_a_long_answer_comes_in_many_chunks(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinkfast.engine.live.FLUSH_SECONDS", 0.0)  # however fast the tokens are drawn
    stream = client.chat.completions.create(model="rambler", messages=ASK, max_tokens=600, stream=True)
    texts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(texts) == "Notes" * 600
    assert sum(map(bool, texts)) > 2


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cross_tokens(client: openai.OpenAI, stream: bool) -> None:
    """The stop string begins in the middle of one token and ends in the middle of another."""
    made = client.chat.completions.create(
        model="rambler", messages=ASK, max_tokens=600, stop=["nothing", "sNot"], stream=stream
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in made]
        text, reason = "".join(choice.delta.content or "" for choice in chunks), chunks[-1].finish_reason
    else:
        text, reason = made.choices[0].message.content, made.choices[0].finish_reason
    assert text == "Note"
    assert reason == "stop"


def test_logprobs(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="talker", messages=ASK, seed=5, max_tokens=500, logprobs=True, top_logprobs=2
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == found.choices[0].message.content
    for token in logprobs.content[1:-2]:
        assert {top.token: round(2.718281828**top.logprob, 3) for top in token.top_logprobs} == {
            "Notes": 0.95,
            "####": 0.05,
        }
        assert bytes(token.bytes or []) == token.token.encode()
    answer = logprobs.content[-1]
    assert {top.token: round(2.718281828**top.logprob, 3) for top in answer.top_logprobs} == {" 7": 0.7, " 8": 0.3}
    assert answer.logprob == pytest.approx(
        next(t.logprob for t in answer.top_logprobs if t.token == answer.token), abs=1e-5
    )


def test_completions(client: openai.OpenAI) -> None:
    found = client.completions.create(model="talker", prompt="Ada has 3", max_tokens=400, seed=1, logprobs=1)
    assert SAID.fullmatch(found.choices[0].text)
    assert found.choices[0].logprobs is not None
    assert "".join(found.choices[0].logprobs.tokens or []) == found.choices[0].text
    ids = client.completions.create(model="rambler", prompt=[5, 6, 7], max_tokens=2)
    assert ids.choices[0].text == "NotesNotes"
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3
    streamed = client.completions.create(model="talker", prompt="Ada has 3", max_tokens=400, seed=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == found.choices[0].text


def test_the_best_answer_by_a_deadline(client: openai.OpenAI) -> None:
    extra = {"time_budget": 20, "strategy": "majority", "return_samples": True, "min_samples": 60}
    found = client.chat.completions.create(model="talker", messages=ASK, n=60, seed=2, extra_body=extra)
    told = (found.model_extra or {})["thinkfast"]
    assert told["answer"] == "7"
    assert told["strategy"] == "majority"
    assert told["stopped"] in ("samples", "decided")
    chains = told["chains"]
    votes = {row["answer"]: row["votes"] for row in told["votes"]}
    ended = [chain for chain in chains if chain["finish_reason"] == "stop"]
    assert votes == {answer: sum(c["answer"] == answer for c in ended) for answer in votes}
    assert told["confidence"] == pytest.approx(votes["7"] / sum(votes.values()), abs=1e-4)
    assert told["samples"] == sum(chain["finish_reason"] != "deadline" for chain in chains)
    assert found.choices[0].message.content == next(c["text"] for c in chains if c["index"] == told["sample"])
    assert (found.choices[0].message.content or "").endswith("#### 7")
    assert found.usage is not None
    assert found.usage.completion_tokens == sum(chain["tokens"] for chain in chains)


def test_a_deadline_is_kept_on_the_wall_clock(client: openai.OpenAI) -> None:
    asked = time.monotonic()
    extra = {"time_budget": 1.5, "strategy": "majority", "return_samples": True}
    found = client.chat.completions.create(model="talker", messages=ASK, seed=2, extra_body=extra)
    assert time.monotonic() - asked < 1.5 + 1.0
    told = (found.model_extra or {})["thinkfast"]
    assert told["answer"] == "7"
    assert told["stopped"] in ("deadline", "samples", "decided")
    assert told["seconds"] < 2.0


def test_usage_counts_what_was_drawn_in_vain(client: openai.OpenAI) -> None:
    extra = {"time_budget": 20, "strategy": "adaptive", "return_samples": True}
    found = client.chat.completions.create(model="talker", messages=ASK, seed=2, extra_body=extra)
    told = (found.model_extra or {})["thinkfast"]
    assert told["stopped"] == "decided"
    assert found.usage is not None
    assert found.usage.completion_tokens > sum(chain["tokens"] for chain in told["chains"]), "chains that were running"
    stopped = client.chat.completions.create(model="rambler", messages=ASK, max_tokens=600, stop="Notes")
    assert stopped.choices[0].message.content == ""
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens >= 1


def test_a_sure_vote_ends_early(client: openai.OpenAI) -> None:
    extra = {"time_budget": 15.0, "strategy": "adaptive"}
    found = client.chat.completions.create(model="talker", messages=ASK, seed=2, extra_body=extra)
    told = (found.model_extra or {})["thinkfast"]
    assert told["stopped"] == "decided"
    assert told["seconds"] < 10
    assert 4 <= told["samples"] < 100
    extra["min_samples"] = 30
    found = client.chat.completions.create(model="talker", messages=ASK, seed=2, extra_body=extra)
    assert (found.model_extra or {})["thinkfast"]["samples"] >= 30


@pytest.mark.parametrize("strategy", ["majority", "best_of_n", "weighted"])
def test_a_number_of_samples_without_a_budget(client: openai.OpenAI, strategy: str) -> None:
    extra = {"strategy": strategy, "return_samples": True}
    found = client.chat.completions.create(model="talker", messages=ASK, n=7, seed=4, extra_body=extra)
    told = (found.model_extra or {})["thinkfast"]
    assert told["samples"] <= 7
    assert told["strategy"] == strategy
    if strategy == "best_of_n":
        best = max((c for c in told["chains"] if c["answer"]), key=lambda c: c["score"])
        assert told["answer"] == best["answer"]


def test_a_budget_that_is_too_short_has_no_answer(serve: Callable[..., str]) -> None:
    """Nothing of this model ever ends: that there is an answer at all is the deadline's doing."""
    address = serve(Limits(answer=100_000, budget=3600.0))
    with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=120) as client:
        asked = time.monotonic()
        found = client.chat.completions.create(model="endless", messages=ASK, extra_body={"time_budget": 0.3})
        assert time.monotonic() - asked < 1.5
    told = (found.model_extra or {})["thinkfast"]
    assert (told["answer"], told["confidence"], told["samples"]) == (None, 0.0, 0)
    assert told["stopped"] == "deadline"
    assert told["seconds"] >= 0.3 * 0.85, "what there was of the budget was used"
    assert found.choices[0].finish_reason == "length"


def test_chains_arrive_while_the_vote_moves(client: openai.OpenAI) -> None:
    extra = {"time_budget": 20, "return_samples": True}
    seen, last, text = [], None, ""
    for chunk in client.chat.completions.create(model="talker", messages=ASK, n=12, stream=True, extra_body=extra):
        news = (chunk.model_extra or {}).get("thinkfast")
        if news and "chain" in news:
            seen.append(news)
        elif news:
            last = news
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert last is not None
    assert len(seen) > 3
    assert [sum(row["votes"] for row in news["votes"]) for news in seen[:3]] == [1, 2, 3]
    assert [news["seconds"] for news in seen] == sorted(news["seconds"] for news in seen)
    assert SAID.fullmatch(text)
    assert last["votes"] == seen[-1]["votes"]


def test_many_clients_share_the_engine(address: str) -> None:
    async def everyone() -> list[dict[str, Any]]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=60) as client:

            async def one() -> dict[str, Any]:
                extra = {"time_budget": 20, "min_samples": 8}
                found = await client.chat.completions.create(model="talker", messages=ASK, n=8, extra_body=extra)
                told: dict[str, Any] = (found.model_extra or {})["thinkfast"]
                return told

            return await asyncio.gather(*[one() for _ in range(16)])

    found = asyncio.run(everyone())
    assert [told["samples"] for told in found] == [8] * 16, "nobody is left aside"


def test_many_clients_are_all_answered_by_one_deadline(address: str) -> None:
    async def everyone() -> list[tuple[float, int]]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=60) as client:

            async def one() -> tuple[float, int]:
                asked = time.monotonic()
                extra = {"time_budget": 2.0}
                found = await client.chat.completions.create(model="talker", messages=ASK, extra_body=extra)
                return time.monotonic() - asked, (found.model_extra or {})["thinkfast"]["samples"]

            return await asyncio.gather(*[one() for _ in range(16)])

    found = asyncio.run(everyone())
    counts = [samples for _, samples in found]
    assert max(seconds for seconds, _ in found) < 2.0 + 0.75
    assert min(counts) > 0
    assert max(counts) <= 8 * min(counts) + 8, "nobody is left aside"


def test_errors_have_the_clients_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here, expected one of talker, rambler"):
        client.chat.completions.create(model="gpt", messages=ASK)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="talker", messages=ASK, temperature=9)
    assert caught.value.param == "temperature"
    assert "less than or equal to 2, not 9" in caught.value.message
