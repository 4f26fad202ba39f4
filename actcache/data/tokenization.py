"""Documents to token ids: text by the tokenizer, conversations by its chat template first."""

from __future__ import annotations

from typing import Any

from actcache.data.chats import chat_text
from actcache.data.datasets import Kind, Record
from actcache.data.token_rows import row_ids


def tokenize(tokenizer: Any, kind: Kind, records: list[Record]) -> list[list[int]]:
    """Tokenise documents. Only a chat template adds special tokens.

    Raises:
        DatasetError: the chat template refuses a conversation.
    """
    if not records:
        return []
    if kind == "ids":
        return [row_ids(record) for record in records]
    if kind == "chat":
        records = [chat_text(tokenizer, record) for record in records]
    encoded = tokenizer(
        records, add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids
