"""From a problem to the prompt a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from thinkfast.data.tokenizer import Tokenizer
from thinkfast.errors import BadInput


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise BadInput(f"chat template: {message}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """How a problem is put to a model: a system turn, solved problems before it, and `user` around its text.

    user: "{problem}" stands for the problem's text. shots: (problem, solution) pairs, oldest first.
    """

    name: str = "plain"
    system: str | None = None
    user: str = "{problem}"
    shots: tuple[tuple[str, str], ...] = ()


BOXED = "{problem}\n\nReason step by step, and put the final answer into \\boxed{}."
PROMPTS = {
    "plain": Prompt(),
    "boxed": Prompt("boxed", user=BOXED),
    "hash": Prompt("hash", user="{problem}\n\nReason step by step, and end with a line: #### and the number."),
    "system-boxed": Prompt("system-boxed", system=BOXED.partition("\n\n")[2]),
}
"""The prompts that have a name; any of them takes shots."""


def named_prompt(name: str, solved: Sequence[tuple[str, str]] = (), shots: int = 0) -> Prompt:
    """A prompt of `PROMPTS` with the first `shots` of the solved problems. Raises BadInput for an unknown name, and
    when there are fewer solved problems than shots."""
    if name not in PROMPTS:
        raise BadInput(f"prompt {name!r}: expected one of {', '.join(PROMPTS)}")
    if shots > len(solved):
        raise BadInput(f"shots = {shots}: only {len(solved)} solved problems to take them from")
    return replace(PROMPTS[name], shots=tuple(solved[:shots]))


def render_prompt(tokenizer: Tokenizer, problem: str, prompt: Prompt = PROMPTS["plain"]) -> list[int]:
    """Token ids of the turns up to the one to be answered: by the tokenizer's chat template, or as plain text.

    Plain text has a line end after each turn and an empty line after each solved problem. Raises BadInput where the
    template refuses the turns.
    """
    asked = [prompt.user.replace("{problem}", text) for text in (*(shot for shot, _ in prompt.shots), problem)]
    if tokenizer.chat_template is None:
        system = f"{prompt.system}\n\n" if prompt.system else ""
        solved = "".join(f"{ask}\n{shot[1]}\n\n" for ask, shot in zip(asked, prompt.shots, strict=False))
        return tokenizer.encode(f"{tokenizer.bos_token}{system}{solved}{asked[-1]}\n")
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    for ask, (_, solution) in zip(asked, prompt.shots, strict=False):
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": solution}]
    return render_messages(tokenizer, [*messages, {"role": "user", "content": asked[-1]}])


def render_messages(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation (`role`, `content`), ready to be answered. Without a template, a turn a line."""
    if tokenizer.chat_template is None:
        lines = "".join(f"{message['content']}\n" for message in messages)
        return tokenizer.encode(f"{tokenizer.bos_token}{lines}")
    return tokenizer.encode(render_chat(tokenizer, messages))


def render_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], answer: bool = True) -> str:
    """Turns with role and content as text by the tokenizer's chat template; `answer`: ready to be answered.

    Raises BadInput where there is no template or it refuses the turns.
    """
    if tokenizer.chat_template is None:
        raise BadInput("the tokenizer has no chat template")
    try:
        return _compiled(tokenizer.chat_template).render(
            messages=list(messages),
            add_generation_prompt=answer,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
        )
    except jinja2.TemplateError as error:
        raise BadInput(f"chat template: {error}") from error
