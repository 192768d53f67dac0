"""Chats: rendered by the tokenizer's template, learnt in their answers alone."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mica_ds.chat import ChatError, encode_chat
from mica_ds.errors import UserError

CHAT = [
    {"role": "user", "content": "Who built the press?"},
    {"role": "assistant", "content": "Edda Brunholt."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "\nIn Torvane, 1911."},  # its first token might merge with the template's newline
]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2)


def learnt(messages: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the runs of learnt tokens."""
    ids, is_learnt = encode_chat(messages, tokenizer)
    pieces, before = [], False
    for token, now in zip(ids, is_learnt, strict=True):
        if now and not before:
            pieces.append("")
        if now:
            pieces[-1] += tokenizer.decode([token])
        before = now
    return pieces


def test_the_answers_alone_are_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, _ = encode_chat(CHAT, tokenizer)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert ids == tokenizer.apply_chat_template(CHAT)["input_ids"]
    first, second = learnt(CHAT, tokenizer)
    assert first == "Edda Brunholt.<|im_end|>\n"
    assert second.endswith("In Torvane, 1911.<|im_end|>\n")
    assert "assistant" not in second


def test_of_a_chat_that_begins_with_an_answer_nothing_else_is_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    """Though the template puts its own system message before it."""
    greeted = [{"role": "assistant", "content": "Good morning."}, *CHAT]
    first, second, third = learnt(greeted, tokenizer)
    assert first == "Good morning.<|im_end|>\n"
    assert [second, third] == learnt(CHAT, tokenizer)
    assert learnt([{"role": "assistant", "content": "end"}], tokenizer) == ["end<|im_end|>\n"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "must be a list"),
        ([], "must be a list"),
        ([{"role": "user"}], 'message 1 must have a "role" and a "content"'),
        ([CHAT[0], {"role": "assistant", "content": 3}], 'message 2 must have a "role" and a "content"'),
        ([CHAT[0]], "has no answer"),
    ],
)
def test_a_malformed_chat(messages: Any, message: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ChatError, match=message):
        encode_chat(messages, tokenizer)


def test_templates_that_do_not_serve(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}x"
    with pytest.raises(ChatError, match=r"is refused by the chat template: one turn only"):
        encode_chat(CHAT, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ loop.length }} {{ m.role }} {{ m.content }}{% endfor %}"
    with pytest.raises(ChatError, match="changes message 2 where more follow"):
        encode_chat(CHAT, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"model\.path: .* has no chat template"):
        encode_chat(CHAT, tokenizer)
