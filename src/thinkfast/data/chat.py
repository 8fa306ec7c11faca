"""From a problem to the prompt a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from thinkfast.data.tokenizer import Tokenizer
from thinkfast.errors import BadInput


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise BadInput(f"chat template: {message}")


def render_prompt(tokenizer: Tokenizer, problem: str) -> list[int]:
    """Token ids of one user turn, ready to be answered: the tokenizer's chat template, or plain text and a line end."""
    return render_messages(tokenizer, [{"role": "user", "content": problem}])


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
