"""Conversations to text, by the tokenizer's chat template.

A message is given to the template as its file has it, except that

- keys of a message whose value is null are taken out; Parquet files and datasets, where null also
  stands for a key that only other rows have, have lost theirs at every depth before;
- messages with `from` and `value` (ShareGPT) get `role` and `content`;
- arguments of tool calls that are JSON in a string become objects, unless the template writes out
  or joins them as strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from actcache.data.records import Record
from actcache.data.table_rows import DOCUMENT
from actcache.errors import DatasetError

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Speakers of ShareGPT, and their roles."""
_NO_COLUMNS = {
    *("messages", "add_generation_prompt", "continue_final_message", "raise_exception"),
    *("strftime_now", "tokenize", "chat_template", "conversation", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("sanitize_control_tokens", "tokenizer_kwargs", "range", "dict", "lipsum", "cycler"),
    *("joiner", "namespace", "loop", "self"),
}
"""Names in templates that are no columns, beside the special tokens."""
_GENERATION = re.compile(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}")
"""Tags that transformers adds to the language of templates."""
_LISTS = ("tools", "documents")
"""Variables that are lists of objects; tables may hold them as JSON in a string."""


def template_variables(tokenizer: Any) -> frozenset[str]:
    """Return the variables that a chat template reads besides the messages, such as tools."""
    import jinja2
    import jinja2.meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # noqa: S701 (parsed, never rendered)
    templates = getattr(tokenizer, "chat_template", None) or {}
    texts = list(templates.values()) if isinstance(templates, dict) else [templates]
    found: set[str] = set()
    for text in texts:
        try:
            parsed = environment.parse(_GENERATION.sub("", text))
        except jinja2.TemplateError:  # the first conversation will show the error
            continue
        found |= jinja2.meta.find_undeclared_variables(parsed)
    names = {name for name in found if not name.endswith("_token")}
    return frozenset(names - _NO_COLUMNS)


def closing_token(tokenizer: Any) -> str | None:
    """Return the token with which the template ends a conversation, white space apart; or None."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for content in ("a", [{"type": "text", "text": "a"}]):  # some templates take parts only
        messages = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
        except Exception:  # noqa: S112 (templates are programs that can raise anything)
            continue
        ends = [token for token in tokens if token.strip() and text.endswith(token)]
        return max(ends, key=len, default=None)
    return None


def chat_text(tokenizer: Any, record: Record) -> str:
    """Render a conversation, special tokens and all.

    Args:
        tokenizer: it has a chat template.
        record: the messages; or, with further columns of `template_variables`, a dict of them.

    Raises:
        DatasetError: the chat template refuses it.
    """
    columns = dict(record) if isinstance(record, dict) else {DOCUMENT: record}
    stored = columns.pop(DOCUMENT)
    for name in _LISTS:
        stored_list = _parsed(columns.get(name))
        is_none = isinstance(stored_list, str) and stored_list.strip() in ("", "null")
        columns[name] = None if is_none else stored_list or None
    try:
        messages = [_message(message) for message in stored]
        return _rendered(tokenizer, messages, columns)
    except Exception as error:  # templates are programs that can raise anything
        raise _refused(error, stored) from error


def chat_text_before(tokenizer: Any, record: Record) -> str:
    """Render a conversation as format versions 1 and 2 did; as `chat_text`.

    Nulls are taken out of messages at their top, and nothing else is changed.
    """
    stored = record[DOCUMENT] if isinstance(record, dict) else record
    messages = [{k: v for k, v in message.items() if v is not None} for message in stored]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        raise _refused(error, stored) from error
    return text


def _refused(error: Exception, stored: list[dict[str, Any]]) -> DatasetError:
    roles = [message.get("role", message.get("from")) for message in stored][:8]
    return DatasetError(
        "the tokenizer's chat template refuses a conversation",
        got=f"{type(error).__name__}: {error}, roles {roles}",
        remedy="its messages need the roles, contents and order that the template requires",
    )


def _message(stored: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in stored.items() if value is not None}
    if "role" in message:
        return message
    speaker, content = message.pop("from"), message.pop("value", "")
    if speaker not in _ROLES:
        raise ValueError(f"a message from {speaker!r}, none of {', '.join(_ROLES)}")
    return {"role": _ROLES[speaker], "content": content, **message}


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], columns: dict[str, Any]) -> str:
    """Render with the arguments of tool calls as objects, or, if that fails, as strings."""

    def render(form: Callable[[Any], Any]) -> str:
        given = [_with_arguments(message, form) for message in messages]
        text: str = tokenizer.apply_chat_template(given, tokenize=False, **columns)
        return text

    arguments = [_parsed(call["arguments"]) for message in messages for call in _calls(message)]
    if not arguments:
        return render(_parsed)
    try:
        text = render(_parsed)
    except Exception:
        try:
            return render(_string)  # such as a template that joins them with +
        except Exception:  # noqa: S110 (the error of the usual form is the one to report)
            pass
        raise
    # A template that writes them out as they are gives Python's form of an object.
    return render(_string) if any(a and repr(a) in text for a in arguments) else text


def _calls(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what holds the name and arguments of each tool call of a message."""
    calls = message.get("tool_calls")
    for call in [*(calls if isinstance(calls, list) else []), message.get("function_call")]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and "arguments" in function:
            yield function


def _with_arguments(message: dict[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    if not any(_calls(message)):
        return message
    message = json.loads(json.dumps(message, default=str))  # a copy
    for call in _calls(message):
        call["arguments"] = form(call["arguments"])
    return message


def _parsed(value: Any) -> Any:
    """Parse JSON in a string; what is none, or no object or list, stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if isinstance(found, dict | list) else value


def _string(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
