"""Fields of a configuration that are options of the command line.

An option is written once: a field's type makes the parser, its docstring the help, and the metadata
that `option` attaches sets its place in the help and what a resumed run may change. Standard
library only: `--help` reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from actcache.errors import ConfigError

MAIN = "Main options"
"""Group that the help lists first: what most commands need."""

OnResume = Literal["fixed", "forced", "free"]
"""Whether a resumed run may change an option: never, with --force-config, or always."""


def option(
    default: Any = dataclasses.MISSING,
    *,
    group: str,
    on_resume: OnResume = "fixed",
    label: str | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    alias: str | None = None,
    omitted: bool = False,
    listed: bool = True,
) -> Any:
    """Declare a field of a frozen dataclass that is an option of the command line.

    Args:
        default: value where the option is not given; without one, the option is required.
        group: heading under which the help lists it.
        on_resume: whether a resumed run may change it.
        label: what stands for its name in the folder name of an SAE of a grid.
        metavar: what the help prints for its value; by default, the type's name.
        parse: function from one value on the command line to that of the field, for types that the
            parser does not support; it raises `ValueError`.
        alias: another name for it on the command line.
        omitted: whether a JSON file leaves it out while it has its default (see `json_codec`), as
            files from before the option do.
        listed: whether the help lists it.
    """
    metadata = {
        "group": group,
        "on_resume": on_resume,
        "label": label,
        "metavar": metavar,
        "parse": parse,
        "alias": alias,
        "omitted": omitted,
        "listed": listed,
    }
    return dataclasses.field(default=default, metadata=metadata)


def hidden(*, default_factory: Callable[[], Any] = tuple, on_resume: OnResume = "fixed") -> Any:
    """Declare a field that Python and configuration files set, and the command line does not."""
    metadata = {"option": False, "on_resume": on_resume}
    return dataclasses.field(default_factory=default_factory, metadata=metadata)


def names_on_resume(config_class: type[Any], on_resume: OnResume) -> tuple[str, ...]:
    """List the fields of a configuration that a resumed run may change in this way, in order."""
    fields = dataclasses.fields(config_class)
    return tuple(f.name for f in fields if f.metadata.get("on_resume", "fixed") == on_resume)


def option_name(field: dataclasses.Field[Any]) -> str:
    """Return what errors call a field: CACHE, --batch-size, or d_in where it is no option."""
    if "group" not in field.metadata:
        return field.name
    if field.default is dataclasses.MISSING and field.name != "out":
        return field.name.upper()
    return "--" + field.name.replace("_", "-")


def require_names(config: Any, *named: str) -> None:
    """Raise `ConfigError` if one of the fields `named` is empty.

    An unset variable of a shell would stand for the folder in which the command was started.
    """
    for field in dataclasses.fields(config):
        if field.name in named and not getattr(config, field.name):
            shown = option_name(field)
            raise ConfigError(f"{shown} is empty", expected="a folder, or its name", got="''")
