"""Scores of completions from published reward models: process models in four layouts, and preference models.

A process model scores every step of a solution; the layouts differ in how a solution is cut into steps, in the tokens
that stand between them and in where the score is read. Needs `pip install thinkfast[reward]` (transformers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thinkfast import records
from thinkfast.errors import BadInput

How = Literal["last", "min", "product", "mean"]
HOW: tuple[How, ...] = ("last", "min", "product", "mean")
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def fold_steps(steps: Sequence[float], how: How) -> float:
    """One score out of those of the steps: the last, the smallest, their product or their mean; nan without steps."""
    if not steps:
        return math.nan
    if how == "last":
        return float(steps[-1])
    if how == "min":
        return float(min(steps))
    return float(math.prod(steps)) if how == "product" else float(sum(steps) / len(steps))


def split_steps(text: str, separator: str) -> list[str]:
    """The steps of a solution, without empty ones."""
    return [step.strip() for step in text.split(separator) if step.strip()]


Tokens = tuple[list[int], list[int]]
"""Token ids of problem and solution, and the places where the scores of the steps are read."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A kind of process model.

    separator: what stands between two steps of a completion. lay: tokenizer, problem, steps to `Tokens`. head: which
    head the model has. read: the head's outputs at the places (steps, width) and the tokenizer to scores in 0..1.
    """

    separator: str
    lay: Callable[[Any, str, Sequence[str]], Tokens]
    head: Literal["language", "value", "two-class"]
    read: Callable[[Any, Any], list[float]]


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _one_id(tokenizer: Any, text: str) -> int:
    """The last id of a text; how the published code of these models finds its marks."""
    return _plain_ids(tokenizer, text)[-1]


def _begin(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def _lay_rlhflow(tokenizer: Any, problem: str, steps: Sequence[str]) -> Tokens:
    """Every step is a user turn that the assistant answers with a plus; the score is read where that is foretold."""
    turns: list[dict[str, str]] = []
    places = []
    for index, step in enumerate(steps):
        turns.append({"role": "user", "content": f"{problem} {step}" if index == 0 else step})
        # The ids with the prompt of the answer end right before the plus.
        ahead = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        places.append(len(ahead) - 1)
        turns.append({"role": "assistant", "content": "+"})
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    return list(ids), places


def _lay_shepherd(tokenizer: Any, problem: str, steps: Sequence[str]) -> Tokens:
    mark = _one_id(tokenizer, "ки")
    ids = [*_begin(tokenizer), *_plain_ids(tokenizer, f"{problem} " + "\n".join(f"{step} ки" for step in steps))]
    return ids, [place for place, token in enumerate(ids) if token == mark][-len(steps) :]


def _lay_skywork(tokenizer: Any, problem: str, steps: Sequence[str]) -> Tokens:
    mark = _one_id(tokenizer, "\n")
    ids, places = [*_begin(tokenizer), *_plain_ids(tokenizer, f"{problem}\n")], []
    for step in steps:
        ids += [*_plain_ids(tokenizer, step), mark]
        places.append(len(ids) - 1)
    return ids, places


def _lay_qwen(tokenizer: Any, problem: str, steps: Sequence[str]) -> Tokens:
    mark = _one_id(tokenizer, "<extra_0>")
    turns = [
        {"role": "system", "content": QWEN_SYSTEM},
        {"role": "user", "content": problem},
        {"role": "assistant", "content": "".join(f"{step}<extra_0>" for step in steps)},
    ]
    ids = list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))
    return ids, [place for place, token in enumerate(ids) if token == mark][-len(steps) :]


def _plus_against_minus(logits: Any, tokenizer: Any) -> list[float]:
    columns = logits[:, [_one_id(tokenizer, "+"), _one_id(tokenizer, "-")]]
    return [float(value) for value in columns.softmax(-1)[:, 0]]


LAYOUTS: Mapping[str, Layout] = {
    "rlhflow": Layout("\n\n", _lay_rlhflow, "language", _plus_against_minus),
    "math-shepherd": Layout("\n", _lay_shepherd, "language", _plus_against_minus),
    "skywork": Layout("\n", _lay_skywork, "value", lambda out, _: [float(v) for v in out[:, 0].sigmoid()]),
    "qwen": Layout("\n\n", _lay_qwen, "two-class", lambda out, _: [float(v) for v in out.softmax(-1)[:, 1]]),
}
PREFERENCE = "preference"


def layout_of(model_dir: Path) -> str:
    """The layout that a directory's config.json and tensors show. Raises BadInput where they show none."""
    config = records.read_json(model_dir / "config.json")
    named = (config.get("architectures") or [""])[0] if isinstance(config, dict) else ""
    names = set(_tensor_names(model_dir))
    if any(name.startswith("v_head.") for name in names):
        return "skywork"
    known = {
        "Qwen2ForProcessRewardModel": "qwen",
        "LlamaForCausalLM": "rlhflow",
        "MistralForCausalLM": "math-shepherd",
    }
    if named in known:
        return known[named]
    if named.endswith("ForSequenceClassification"):
        return PREFERENCE
    expected = f"{', '.join(known)}, a v_head, or ...ForSequenceClassification"
    raise BadInput(f"{model_dir / 'config.json'}: architectures names {named!r}, expected {expected}")


def _tensor_names(model_dir: Path) -> Iterator[str]:
    from safetensors import safe_open

    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            yield from file.keys()


def _tensors(model_dir: Path, prefix: str) -> dict[str, Any]:
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    return found


class RewardModel:
    """A reward model of one of `LAYOUTS`, or a preference model, ready to score.

    layout: by default what the directory shows. Raises BadInput without transformers, for an unknown layout, and where
    tensors of the head are missing or the tokenizer lacks the marks.
    """

    def __init__(self, model_dir: Path, layout: str | None = None, device: str = "cpu") -> None:
        try:
            import transformers
        except ImportError:
            raise BadInput("reward models need the extra: pip install 'thinkfast[reward]'") from None
        self.layout = layout or layout_of(model_dir)
        if self.layout not in (*LAYOUTS, PREFERENCE):
            raise BadInput(f"layout {self.layout!r}: expected one of {', '.join((*LAYOUTS, PREFERENCE))}")
        self._device = device
        # The file as it stands: by the model type, AutoTokenizer would put rules of its own over it.
        self._tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model_dir)
        config = records.read_json(model_dir / "config.json")
        if len(self._tokenizer) > config.get("vocab_size", math.inf):
            raise BadInput(f"{model_dir}: the tokenizer has more tokens than the model, it is another model's")
        if self.layout == PREFERENCE:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(model_dir)
            if model.config.num_labels != 1:
                raise BadInput(f"{model_dir / 'config.json'}: num_labels is {model.config.num_labels}, expected 1")
            self._model: Any = model.eval().to(device)
            return
        kind = LAYOUTS[self.layout].head
        auto = transformers.AutoModelForCausalLM if kind == "language" else transformers.AutoModel
        self._model = auto.from_pretrained(model_dir).eval().to(device)
        self._head = None if kind == "language" else _head(model_dir, kind, device)
        self._check_marks(model_dir)

    def _check_marks(self, model_dir: Path) -> None:
        marks = {"math-shepherd": ("ки", "+", "-"), "rlhflow": ("+", "-"), "skywork": ("\n",), "qwen": ("<extra_0>",)}
        for mark in marks[self.layout]:
            ids = _plain_ids(self._tokenizer, mark)
            if not ids or ids[-1] == self._tokenizer.unk_token_id:
                raise BadInput(f"{model_dir}: the tokenizer has no token for {mark!r}, which {self.layout} asks for")

    def steps(self, problem: str, completion: str) -> list[float]:
        """The score of every step, 0..1; one unbounded score for a preference model. Empty for an empty completion."""
        import torch

        with torch.inference_mode():
            if self.layout == PREFERENCE:
                turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": completion}]
                ids = self._tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
                return [float(self._model(torch.tensor([ids], device=self._device)).logits[0, 0])]
            layout = LAYOUTS[self.layout]
            steps = split_steps(completion, layout.separator)
            if not steps:
                return []
            ids, places = layout.lay(self._tokenizer, problem, steps)
            out = self._model(torch.tensor([ids], device=self._device))
            read = out.logits[0, places] if self._head is None else self._head(out.last_hidden_state[0, places])
            return layout.read(read.float().cpu(), self._tokenizer)


def _head(model_dir: Path, kind: str, device: str) -> Any:
    """The head behind the last hidden state: one linear map, or two with a ReLU between."""
    import torch

    names = ("v_head.summary",) if kind == "value" else ("score.0", "score.2")
    held = _tensors(model_dir, names[0].split(".")[0])
    layers: list[Any] = []
    for name in names:
        weight, bias = held.get(f"{name}.weight"), held.get(f"{name}.bias")
        if weight is None or bias is None:
            raise BadInput(f"{model_dir}: no {name}.weight and {name}.bias in its tensors")
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]).to(device).eval()
