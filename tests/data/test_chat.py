"""Prompts come from the chat template, and a broken template is the user's to hear about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from thinkfast.data import chat, tokenizer
from thinkfast.errors import BadInput


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    path: Path = tmp_path_factory.mktemp("words")
    tokenizer.save_word_tokenizer(path)
    return tokenizer.load_tokenizer(path)


def test_template_is_rendered_with_special_tokens(words: tokenizer.Tokenizer) -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}{% if add_generation_prompt %} ####{% endif %}"
    ids = chat.render_prompt(replace(words, chat_template=template), "Ava has 5 eggs.")
    assert ids == words.encode("<bos>Ava has 5 eggs. ####")


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages.missing.field }}", "{{ raise_exception('no') }}"])
def test_broken_templates_are_bad_input(words: tokenizer.Tokenizer, template: str) -> None:
    with pytest.raises(BadInput, match="chat template"):
        chat.render_prompt(replace(words, chat_template=template), "Ava has 5 eggs.")
