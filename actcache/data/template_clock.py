"""The moment that a chat template reads from the clock, pinned: a resumed harvest renders the same.

Templates of transformers have one function that reads it, `strftime_now`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from actcache.errors import ModelError

_CLOCK = "strftime_now"
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


def now() -> str:
    """Return the present moment as `pin_clock` takes it."""
    return datetime.now().astimezone().replace(microsecond=0, tzinfo=None).isoformat()


def pin_clock(tokenizer: Any, date: Callable[[], str]) -> str | None:
    """Let the chat templates of a tokenizer read one moment instead of the clock.

    Args:
        tokenizer: tokenizer of transformers; its `apply_chat_template` is replaced.
        date: function to the moment, ISO 8601; called if a template reads the clock.

    Returns:
        The moment, in full; None if no template reads the clock.

    Raises:
        ModelError: this version of transformers has another clock.
    """
    given = getattr(tokenizer, "chat_template", None) or {}
    templates = [given] if isinstance(given, str) else list(given.values())
    templates = [text for text in templates if _CLOCK in _COMMENT.sub("", text)]
    if not templates:
        return None
    moment = datetime.fromisoformat(date())
    render = functools.partial(type(tokenizer).apply_chat_template, tokenizer)

    def pinned(*arguments: Any, **options: Any) -> Any:
        with _clock_at(moment, templates):
            return render(*arguments, **options)

    _compiled(templates)  # refuses before the harvest what would be refused in it
    tokenizer.apply_chat_template = pinned
    return moment.isoformat()


@contextmanager
def _clock_at(moment: datetime, templates: Sequence[str]) -> Iterator[None]:
    compiled = _compiled(templates)
    for template in compiled:
        template.globals[_CLOCK] = moment.strftime
    try:
        yield
    finally:
        for template in compiled:
            del template.globals[_CLOCK]


def _compiled(templates: Sequence[str]) -> list[Any]:
    """Return the compiled templates that transformers keeps, whose clock can be set.

    An argument of `apply_chat_template` does not do: transformers makes text of functions there.
    """
    from transformers.utils import chat_template_utils

    compiled = [chat_template_utils._compile_jinja_template(text) for text in templates]
    again = chat_template_utils._compile_jinja_template(templates[0])
    if again is not compiled[0] or _CLOCK not in again.environment.globals:
        raise ModelError(
            "the moment that a chat template reads from the clock cannot be set in this version "
            "of transformers",
            expected=f"a compiled template that is kept, with a function {_CLOCK}",
            remedy="install another version of transformers, or remove the date from the template",
        )
    return compiled
