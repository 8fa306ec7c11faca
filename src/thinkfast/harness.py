"""thinkfast as a model of the Language Model Evaluation Harness (`lm_eval`), under the name `thinkfast`.

    lm_eval --model thinkfast --model_args path=runs/demo/models/hybrid --tasks gsm8k

The installed package registers it (`plugin.py`), and so does importing this module. `thinkfast-lm-eval` is the same
command line, in which bad input is one line.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from thinkfast.data.chat import render_chat
from thinkfast.data.tokenizer import load_tokenizer
from thinkfast.engine.engine import Engine
from thinkfast.engine.sampling import SamplingParams
from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLING = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed")
Pair = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("thinkfast")
class ThinkfastLM(TemplateLM):
    """Log-likelihoods by the decoder in batches, generation by the engine.

    path: a model directory. batch_size: rows of one forward pass, and slots of the engine. Greedy unless a task asks
    for sampling. Keys and values are in the model's dtype, so that scores are those of the stock implementation.
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str = 16,
        dtype: str = "float32",
        device: str = "cpu",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise BadInput(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        if not str(batch_size).isdigit() or not int(batch_size):
            raise BadInput(f"batch_size is {batch_size!r}, expected a positive integer")
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"  # the harness' command line asks for cuda wherever nothing else is asked for
        self.words = load_tokenizer(path)
        self.model = load_model(path, DTYPES[dtype], device)
        self.batch = min(int(batch_size), max_batch_size or int(batch_size))
        limit = self.model.config.max_position_embeddings
        self.max_length = min(max_length or limit, limit)
        self.max_gen_toks = max_gen_toks
        self._engine = Engine(self.model, slots=self.batch, kv_dtype=dtype)

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token where a task gives no context."""
        begin = self.words.backend.token_to_id(self.words.bos_token)
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer where the harness caches requests."""
        return self.words.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, where one is asked for."""
        return self.words.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as one text."""
        return render_chat(self.words, chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless the text begins with one."""
        begins = bool(self.words.bos_token) and string.startswith(self.words.bos_token)
        special = not begins if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.words.backend.encode(string, add_special_tokens=special).ids
        return ids

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Sum of the continuation's log-probabilities, and whether each of its tokens is the likeliest."""
        rows = [(context + rest)[-(self.max_length + 1) :] for _, context, rest in requests]
        wanted = [min(len(rest), len(row) - 1) for row, (_, _, rest) in zip(rows, requests, strict=True)]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for start in range(0, len(order), self.batch):
            together = order[start : start + self.batch]
            scored = self._score([rows[index] for index in together], [wanted[index] for index in together])
            for index, result in zip(together, scored, strict=True):
                results[index] = result
                if (texts := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _score(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[tuple[float, bool]]:
        """Scores the last `wanted` tokens of each row. Padding stands behind, where nothing sees it."""
        longest = max(map(len, rows)) - 1
        device = self.model.embed_tokens.weight.device
        ids = torch.tensor([[*row[:-1], *[0] * (longest - len(row) + 1)] for row in rows], device=device)
        states = self.model.hidden(ids)
        scored = []
        for state, row, count in zip(states, rows, wanted, strict=True):
            logits = F.linear(state[len(row) - 1 - count : len(row) - 1], self.model.head_weight).float()
            target = torch.tensor(row[len(row) - count :], device=device)
            taken = logits.log_softmax(-1).gather(-1, target[:, None])
            scored.append((float(taken.sum()), bool((logits.argmax(-1) == target).all())))
        return scored

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that do not overlap in what they score."""
        results = []
        for text in (request.args[0] for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs: list[Pair] = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(pairs))
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the `until` texts, the end of text or `max_gen_toks`."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        results = [""] * len(requests)
        for together in groups.values():
            asked = requests[together[0]].args[1]
            texts = self._generate([requests[index].args[0] for index in together], asked)
            for index, text in zip(together, texts, strict=True):
                results[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return results

    def _generate(self, contexts: list[str], asked: dict[str, Any]) -> list[str]:
        settings = normalize_gen_kwargs(asked, self.max_gen_toks)
        unknown = [key for key in settings if key not in SAMPLING]
        if unknown:
            raise BadInput(f"generation_kwargs: {unknown[0]} is not known, expected {', '.join(SAMPLING)}")
        until = [text for text in settings["until"] if text]
        room = self.max_length - settings["max_gen_toks"]
        if room < 1:
            raise BadInput(f"max_gen_toks is {settings['max_gen_toks']}, expected less than {self.max_length}")
        params = SamplingParams(
            max_tokens=settings["max_gen_toks"],
            temperature=settings["temperature"] if settings["do_sample"] else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            top_k=int(settings.get("top_k", 0)),
            seed=int(settings.get("seed", 0)),
            # A text with these tokens has the words as well: it ends early here, and where it ends is decided below.
            stop=tuple(tuple(ids) for text in until if self.words.decode(ids := self.words.encode(text)) == text),
        )
        prompts = [tuple(self.tok_encode(context)[-room:] or [self.prefix_token_id]) for context in contexts]
        asked_for = Counter(prompts)  # a task that repeats a request wants another sample each time
        drawn = self._engine.sample(list(asked_for), max(asked_for.values()), params)
        left = {prompt: iter(samples) for prompt, samples in zip(asked_for, drawn, strict=True)}
        texts = []
        for prompt in prompts:
            text = self.words.decode(list(next(left[prompt]).token_ids))
            for end in until:
                text = text.split(end)[0]
            texts.append(text)
        return texts


def main() -> None:
    """The harness's own command line; bad input is one line and status 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except BadInput as error:
        print(f"thinkfast: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
