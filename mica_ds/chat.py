"""Chats to token ids, of which the answers alone are learnt."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mica_ds.errors import UserError

_ANSWERS = "assistant"
_OTHER = "\ue000"  # what no template writes


class ChatError(ValueError):
    """What is wrong with one chat: `is malformed: …`, to be said after where it stands."""


def encode_chat(messages: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """The token ids of a chat in the tokenizer's template, and which of them belong to an answer. Local.

    An answer reaches from where the template asks for it to the end of its turn, with the token that ends it; one that
    begins the chat, for which nothing asks, from its own first character.

    Args:
        messages: a list of `{"role": …, "content": …}`.
        tokenizer: with a chat template.

    Raises: ChatError where the messages are malformed or the template cannot render them; UserError where the tokenizer
    has no template.
    """
    _check(messages)
    if tokenizer.chat_template is None or not tokenizer.is_fast:
        lack = "chat template (chat_template.jinja)" if tokenizer.chat_template is None else "fast tokenizer"
        raise UserError(f"model.path: {tokenizer.name_or_path} has no {lack}, which rows with messages need")
    text = _render(messages, tokenizer)
    answers = []
    for i, message in enumerate(messages):
        if message["role"] == _ANSWERS:
            after = _render(messages[: i + 1], tokenizer)
            if i:
                before = _render(messages[:i], tokenizer, add_generation_prompt=True)
            else:
                before = _render([{**message, "content": _OTHER}], tokenizer).partition(_OTHER)[0]
            if not (text.startswith(after) and after.startswith(before)):
                raise ChatError(f"cannot be split: the chat template changes message {i + 1} where more follow")
            answers.append(range(len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)  # the template has written them
    is_learnt = [any(start in answer for answer in answers) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], is_learnt


def chat_text(messages: Any) -> str:
    """What is said in a chat, without the template's marks. Local. Raises: ChatError."""
    _check(messages)
    return "\n".join(message["content"] for message in messages)


def _check(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ChatError('is malformed: "messages" must be a list of messages')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ChatError(f'is malformed: message {number} must have a "role" and a "content", both texts')
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise ChatError(f"is malformed: message {number} holds half of a surrogate pair") from None
    if all(message["role"] != _ANSWERS for message in messages):
        raise ChatError(f'has no answer: no message has the role "{_ANSWERS}"')


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError) as error:
        raise ChatError(f"is refused by the chat template: {error}") from None
