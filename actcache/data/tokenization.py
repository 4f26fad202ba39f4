"""Documents to token ids: text by the tokenizer, conversations by its chat template first."""

from __future__ import annotations

from typing import Any

from actcache.data.datasets import Kind, Record
from actcache.errors import DatasetError


def tokenize(tokenizer: Any, kind: Kind, records: list[Record]) -> list[list[int]]:
    """Tokenise documents. Only a chat template adds special tokens.

    Raises:
        DatasetError: the chat template refuses a conversation.
    """
    if not records:
        return []
    if kind == "ids":
        return records
    if kind == "chat":
        return [_chat(tokenizer, record) for record in records]
    encoded = tokenizer(
        records, add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _chat(tokenizer: Any, messages: Record) -> list[int]:
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
