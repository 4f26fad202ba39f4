"""Conversations to token ids, by the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from actcache.data.datasets import Record
from actcache.errors import DatasetError


def chat_ids(tokenizer: Any, messages: Record) -> list[int]:
    """Return the token ids of a conversation. Only the template adds special tokens.

    Raises:
        DatasetError: the chat template refuses it.
    """
    # Tables pad messages with null values for keys that only other messages have.
    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are programs that can raise anything
        raise DatasetError(
            "the tokenizer's chat template refuses a conversation",
            got=f"{type(error).__name__}: {error}, roles {[m.get('role') for m in messages][:8]}",
            remedy="its messages need the roles, contents and order that the template requires",
        ) from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
