"""Arguments of public functions: checked by their type hints and ranges before any work."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, get_type_hints

from actcache.core.json_codec import check_argument
from actcache.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

SIZE = (1, 2**31 - 1)
SEED = (0, 2**32 - 1)
COUNT = (0, 2**53)


def checked(**ranges: tuple[float, float]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function: check and normalise its arguments as `check_fields` does fields.

    Args:
        ranges: smallest and largest value of numbers, by argument.

    The function then raises `ConfigError` for an argument of another type or out of its range.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.cache
        def hints() -> dict[str, Any]:
            return get_type_hints(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            for name, value in given.arguments.items():
                if name in hints():  # all but self
                    value = check_argument(name, hints()[name], value)
                    given.arguments[name] = value
                low, high = ranges.get(name, (0, 0))
                if name in ranges and value is not None and not low <= value <= high:
                    expected = f"{low} to {high}"
                    raise ConfigError(f"{name} is out of range", expected=expected, got=value)
            return function(*given.args, **given.kwargs)

        return call

    return decorate
