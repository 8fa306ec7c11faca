"""What else draws completions: `transformers`, vLLM, or any server that speaks OpenAI's protocol.

Each is a context manager whose block gets what draws as `Engine.stream` does: it takes the pairs already drawn, the
clock's start and its deadline, and yields (prompt index, sample index, sample) in rounds. So they can be compared with
the engine, or replace it. Unlike its own, their texts also depend on what is drawn beside them.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from thinkfast.errors import BadInput
from thinkfast.records import Failed
from thinkfast.scale.cluster import Pair, Stream

if TYPE_CHECKING:
    from torch import Tensor

    from thinkfast.engine.sampling import Sample, SamplingParams

Prompts = Sequence[Sequence[int]]
AUTO, TRANSFORMERS, VLLM = "auto", "transformers", "vllm"
BUSY, PAUSE = (429, 503), 0.2


@dataclass(frozen=True, slots=True)
class Completion:
    """A sample of a server that gives text instead of tokens; otherwise like `engine.Sample`.

    logprob_sum is of the text's tokens alone, 0.0 where the server tells nothing.
    """

    text: str
    token_count: int
    finish_reason: str
    t_start: float
    t_end: float
    logprob_sum: float


def open_endpoint(
    name: str,
    model_dir: Path,
    prompts: Prompts,
    n: int,
    params: SamplingParams,
    slots: int,
    dropped: Collection[int] = (),
) -> AbstractContextManager[Stream]:
    """The back end of that name: "transformers", "vllm" or the address of a server. Raises BadInput for another.

    dropped: prompts of which no more samples are started; may grow meanwhile.
    """
    if name == TRANSFORMERS:
        return transformers_endpoint(model_dir, prompts, n, params, slots, dropped)
    if name == VLLM:
        return vllm_endpoint(model_dir, prompts, n, params, slots, dropped)
    if name.startswith(("http://", "https://")):
        return http_endpoint(name, model_dir.resolve().name, prompts, n, params, slots, dropped)
    raise BadInput(f"backend is {name!r}, expected auto, transformers, vllm or an address that begins with http://")


@contextmanager
def transformers_endpoint(
    model_dir: Path, prompts: Prompts, n: int, params: SamplingParams, slots: int, dropped: Collection[int]
) -> Iterator[Stream]:
    """`generate` of the stock model, `slots` samples a batch; all samples of a batch end with its last one."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, LogitsProcessorList
    except ImportError:
        raise BadInput("backend transformers: needs the extra: pip install 'thinkfast[export]'") from None
    from thinkfast.engine.sampling import DEADLINE, LENGTH, STOP, Sample
    from thinkfast.engine.slots import Rounds

    model: Any = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype="auto")
    model.eval()
    named = model.generation_config.eos_token_id
    eos = set(named if isinstance(named, list) else [] if named is None else [named])
    pad = model.generation_config.pad_token_id
    pad = min(eos, default=0) if pad is None else pad

    class Listening:
        """Adds up the log-probabilities of what was chosen; comes before temperature and cuts."""

        def __init__(self, rows: int) -> None:
            self.total = torch.zeros(rows, dtype=torch.float64)
            self.running = torch.ones(rows, dtype=torch.bool)
            self.last: Tensor | None = None

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.choose(input_ids[:, -1])
            self.last = scores.float().log_softmax(-1).cpu()
            return scores

        def choose(self, tokens: Tensor) -> None:
            if self.last is not None:
                chosen = self.last.gather(1, tokens.cpu()[:, None])[:, 0].double()
                self.total += torch.where(self.running, chosen, 0.0)
                self.running &= ~torch.tensor([int(token) in eos for token in tokens])

    def stream(skip: Collection[Pair], start: float, deadline: float) -> Iterator[tuple[int, int, Sample]]:
        rounds, origin = Rounds(len(prompts), n, skip, dropped), time.monotonic() - start
        while pairs := list(islice(rounds, slots)):
            began = time.monotonic() - origin
            if began >= deadline:
                return
            width = max(len(prompts[problem]) for problem, _ in pairs)
            ids = torch.full((len(pairs), width), pad)
            for row, (problem, _) in enumerate(pairs):
                ids[row, width - len(prompts[problem]) :] = torch.tensor(list(prompts[problem]))
            lengths = torch.tensor([len(prompts[problem]) for problem, _ in pairs])
            mask = (torch.arange(width) >= width - lengths[:, None]).long()
            torch.manual_seed((params.seed + pairs[0][0] + len(prompts) * pairs[0][1]) % 2**63)
            listening = Listening(len(pairs))
            how: dict[str, Any] = {"do_sample": params.temperature > 0}
            if params.temperature > 0:
                how |= {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=params.max_tokens,
                max_time=deadline - began,
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([listening]),
                **how,
            )
            listening.choose(out[:, -1])
            ended = time.monotonic() - origin
            for (problem, index), row, total in zip(pairs, out[:, width:].tolist(), listening.total, strict=True):
                length = next((at for at, token in enumerate(row) if token in eos), len(row))
                late = DEADLINE if ended >= deadline else LENGTH
                reason = STOP if length < len(row) else LENGTH if len(row) == params.max_tokens else late
                yield problem, index, Sample(tuple(row[:length]), reason, began, ended, float(total))

    yield stream


@contextmanager
def vllm_endpoint(
    model_dir: Path, prompts: Prompts, n: int, params: SamplingParams, slots: int, dropped: Collection[int]
) -> Iterator[Stream]:
    """vLLM in this process, with prefix caching, `slots` samples at a time."""
    try:
        import vllm
    except ImportError:
        raise BadInput("backend vllm: vLLM is not installed, see https://docs.vllm.ai") from None
    from thinkfast.engine.sampling import DEADLINE, LENGTH, STOP, Sample, prompt_key, sample_key
    from thinkfast.engine.slots import Rounds

    engine = vllm.LLM(model=str(model_dir), max_num_seqs=slots, enable_prefix_caching=True).llm_engine
    keys = [prompt_key(params.seed, prompt) for prompt in prompts]

    def ask(problem: int, index: int) -> None:
        how = vllm.SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or -1,
            max_tokens=params.max_tokens,
            seed=sample_key(keys[problem], index) % 2**31,
            logprobs=0,
        )
        engine.add_request(f"{problem}:{index}", {"prompt_token_ids": list(prompts[problem])}, how)

    def stream(skip: Collection[Pair], start: float, deadline: float) -> Iterator[tuple[int, int, Sample]]:
        rounds, origin = Rounds(len(prompts), n, skip, dropped), time.monotonic() - start
        began: dict[str, float] = {}
        latest: dict[str, Any] = {}

        def sample(name: str, output: Any, reason: str, now: float) -> tuple[int, int, Sample]:
            problem, index = map(int, name.split(":"))
            ids = tuple(output.token_ids)
            total = float(output.cumulative_logprob or 0.0)
            if reason == STOP and ids and output.finish_reason == "stop":
                ids = ids[:-1]  # it keeps the end-of-sequence token
            return problem, index, Sample(ids, reason, began.pop(name), now, total)

        while True:
            now = time.monotonic() - origin
            if now >= deadline:
                engine.abort_request(list(began))
                for name in list(began):
                    if name in latest:
                        yield sample(name, latest[name], DEADLINE, now)
                return
            for problem, index in islice(rounds, slots - len(began)):
                ask(problem, index)
                began[f"{problem}:{index}"] = now
            if not began:
                return
            for done in engine.step():
                (latest[done.request_id],) = done.outputs
                if done.finished:
                    output = latest.pop(done.request_id)
                    reason = LENGTH if output.finish_reason == "length" else STOP
                    yield sample(done.request_id, output, reason, time.monotonic() - origin)

    yield stream


@contextmanager
def http_endpoint(
    address: str,
    name: str,
    prompts: Prompts,
    n: int,
    params: SamplingParams,
    slots: int,
    dropped: Collection[int],
) -> Iterator[Stream]:
    """`slots` requests at a time to /v1/completions, one sample each; what runs at the deadline is given up.

    The prompt goes as token ids. The model is the server's of that name, or its only one. The key, where one is needed,
    is taken from OPENAI_API_KEY. Raises BadInput for a server that is not there or refuses, Failed where it breaks.
    """
    from thinkfast.engine.sampling import prompt_key, sample_key
    from thinkfast.engine.slots import Rounds

    server = _Server(address)
    names = [str(model["id"]) for model in server.ask("GET", "/v1/models", None, 30.0)["data"]]
    if name not in names and len(names) != 1:
        raise BadInput(f"{address}: serves {', '.join(names) or 'nothing'}, expected {name}")
    body = {"model": name if name in names else names[0], "max_tokens": params.max_tokens, "logprobs": 0}
    body |= {"temperature": params.temperature, "top_p": params.top_p}
    body |= {"top_k": params.top_k} if params.top_k else {}  # not every server knows it
    keys = [prompt_key(params.seed, prompt) for prompt in prompts]

    def stream(skip: Collection[Pair], start: float, deadline: float) -> Iterator[tuple[int, int, Completion]]:
        rounds, origin = Rounds(len(prompts), n, skip, dropped), time.monotonic() - start
        inbox: queue.SimpleQueue[tuple[int, int, Completion] | BaseException | None] = queue.SimpleQueue()
        turn, over = threading.Lock(), threading.Event()

        def work() -> None:
            mine = _Server(address)
            try:
                while not over.is_set() and (began := time.monotonic() - origin) < deadline:
                    with turn:
                        pair = next(rounds, None)
                    if pair is None:
                        break
                    seed = sample_key(keys[pair[0]], pair[1]) % 2**31
                    asked = body | {"prompt": list(prompts[pair[0]]), "seed": seed}
                    found = mine.ask("POST", "/v1/completions", asked, deadline - began)
                    inbox.put((*pair, _completion(found, began, time.monotonic() - origin)))
            except TimeoutError:
                pass  # the deadline
            except Exception as error:  # noqa: BLE001 - told in the caller's thread
                inbox.put(error)
            finally:
                mine.close()
                inbox.put(None)

        running = slots
        for _ in range(slots):
            threading.Thread(target=work, daemon=True).start()
        try:
            while running:
                event = inbox.get()
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    running -= 1
                else:
                    yield event
        finally:
            over.set()

    try:
        yield stream
    finally:
        server.close()


class _Server:
    """A connection that is kept open."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if not parts.hostname:
            raise BadInput(f"backend is {address!r}, expected the address of a server like http://127.0.0.1:8000")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._address, self._path = address, parts.path.rstrip("/").removesuffix("/v1")
        self._connection = kind(parts.hostname, parts.port)
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            self._headers["Authorization"] = f"Bearer {key}"

    def ask(self, method: str, path: str, body: dict[str, Any] | None, seconds: float) -> Any:
        """The document that answers; waits while the server is busy. Raises TimeoutError after `seconds`."""
        until = time.monotonic() + seconds
        while True:
            status, text = self._once(method, path, body, until)
            if status == 200:
                return json.loads(text)
            if status not in BUSY:
                words = f"{self._address}: {status}: {_message(text)}"
                raise BadInput(words) if status < 500 else Failed(words)
            time.sleep(min(PAUSE, max(0.0, until - time.monotonic())))

    def close(self) -> None:
        self._connection.close()

    def _once(self, method: str, path: str, body: dict[str, Any] | None, until: float) -> tuple[int, bytes]:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.timeout = left
        if self._connection.sock is not None:
            self._connection.sock.settimeout(left)
        try:
            self._connection.request(method, self._path + path, json.dumps(body) if body else None, self._headers)
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except TimeoutError:
            self._connection.close()
            raise
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise BadInput(f"{self._address}: no answer: {error or type(error).__name__}") from error


def _message(text: bytes) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.decode(errors="replace").split())[:200]


def _completion(document: Any, began: float, ended: float) -> Completion:
    choice = document["choices"][0]
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
    count = int((document.get("usage") or {}).get("completion_tokens", len(logprobs)))
    reason = "length" if choice.get("finish_reason") == "length" else "stop"
    total = float(sum(logprobs)) if logprobs else 0.0
    return Completion(choice["text"], count, reason, began, ended, total)
