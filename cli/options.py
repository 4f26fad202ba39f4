"""Command lines generated from configurations: each field is an option, its docstring the help.

An option is thus defined once, in its configuration. Imports only the standard library, typer and
the configuration's module, so that `--help` does not import torch.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from actcache.core.options import MAIN, names_on_resume
from actcache.errors import ConfigError

C = TypeVar("C")

OTHER = "Other options"
"""Heading of options that belong to no group, such as --help."""

_TYPE_NAMES = {
    "<str>": "TEXT",
    "<list[str]>": "TEXT",
    "<int>": "INTEGER",
    "<list[int]>": "INTEGER",
    "<int range>": "INTEGER",
    "<float>": "NUMBER",
}
"""Names in the help of the types of options without a `metavar`."""


def command(
    config_class: type[C], run: Callable[[C, bool], None], positional: Sequence[str]
) -> Callable[..., None]:
    """Build a function that typer turns into a command, and which calls `run(config, json)`.

    Args:
        config_class: a dataclass of str, int, float, bool, Literal, None-able and tuple fields.
        run: implementation of the command; its second argument is `--json`.
        positional: fields that are arguments instead of options.
    """
    docs = field_docs(config_class)
    hints = get_type_hints(config_class)
    parameters = [
        parameter(field, hints[field.name], docs[field.name], field.name in positional)
        for field in option_fields(config_class)
    ]
    parameters.append(flag("json", "Print a machine-readable summary."))

    @functools.wraps(run)
    def invoke(**values: Any) -> None:
        as_json = values.pop("json")
        run(config_class(**{k: frozen(v, hints[k]) for k, v in values.items()}), as_json)

    del invoke.__wrapped__  # typer would follow it to the signature of `run`
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {p.name: p.annotation for p in parameters}
    return invoke


def flag(name: str, text: str) -> inspect.Parameter:
    """Build an on/off option that belongs to the command, not to a configuration."""
    annotation = Annotated[bool, typer.Option(f"--{name}", help=text)]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation
    )


def field_docs(config_class: type[Any]) -> dict[str, str]:
    """Read the string under each field of a dataclass and of its bases, as one paragraph each.

    `{forced}` in it becomes the names of the options that --force-config may change.
    """
    base = config_class.__base__
    docs = field_docs(base) if base is not None and dataclasses.is_dataclass(base) else {}
    (class_,) = ast.parse(inspect.getsource(config_class)).body
    assert isinstance(class_, ast.ClassDef)
    for field, text in zip(class_.body, class_.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            docs[field.target.id] = " ".join(str(text.value.value).split())
    forced = names_on_resume(config_class, "forced")
    options = {field.name for field in option_fields(config_class)}
    listed = ", ".join(name.replace("_", "-") for name in forced if name in options)
    return {name: text.replace("{forced}", listed) for name, text in docs.items()}


def option_fields(config_class: type[Any]) -> list[dataclasses.Field[Any]]:
    """Return the fields that are options: all but those declared `hidden`."""
    fields = dataclasses.fields(config_class)
    return [field for field in fields if field.metadata.get("option", True)]


def parameter(
    field: dataclasses.Field[Any], hint: Any, doc: str, positional: bool
) -> inspect.Parameter:
    """Build the typer option or argument of a configuration field."""
    name = field.name
    kind = inspect.Parameter.KEYWORD_ONLY
    annotation: Any
    if positional:
        annotation = Annotated[hint, typer.Argument(help=doc, metavar=name.upper())]
        return inspect.Parameter(name, kind, annotation=annotation)
    names = [name, *filter(None, [field.metadata.get("alias")])]
    parse = field.metadata.get("parse")
    option = typer.Option(
        *(f"--{n.replace('_', '-')}" for n in names),
        parser=parse,
        help=doc,
        metavar=field.metadata.get("metavar") or type_name(hint),
        rich_help_panel=field.metadata.get("group"),
        hidden=not field.metadata.get("listed", True),
    )
    default: Any = field.default
    if get_origin(hint) is tuple:
        item: Any = get_args(hint)[0] if parse is None else str
        hint, default = list[item], list(default)
    annotation = Annotated[hint, option]
    if default is dataclasses.MISSING:
        return inspect.Parameter(name, kind, annotation=annotation)
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def type_name(hint: Any) -> str | None:
    """Return the name of a type in the help: INTEGER, NUMBER, TEXT, a|b|c; None for a flag."""
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    if args := [arg for arg in get_args(hint) if arg not in (type(None), ...)]:
        return type_name(args[0])  # of an optional value, or of one item of a list
    return {int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(hint)


class GroupedCommand(TyperCommand):
    """Typer command whose help lists options under the headings of their groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group."""
        for heading, records in self.groups(ctx).items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def groups(self, ctx: Any) -> dict[str, list[tuple[str, str]]]:
        """Return (name and type, help) of every parameter by heading, the main options first.

        docs/cli.md is generated from the same lists.
        """
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], MAIN: []}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                name, text = record
                if param.param_type_name == "argument":
                    heading, name = "Arguments", name.partition(" <")[0].upper()
                else:
                    heading = getattr(param, "rich_help_panel", None) or OTHER
                    for click_type, type_text in _TYPE_NAMES.items():
                        name = name.replace(click_type, type_text)
                    name = re.sub(r"<([^<>]+)>", r"\1", name)
                groups.setdefault(heading, []).append((name, text))
        others = groups.pop(OTHER, [])
        groups = {heading: records for heading, records in groups.items() if records}
        groups[OTHER if groups.keys() - {"Arguments"} else "Options"] = others
        return groups


def frozen(value: Any, hint: Any) -> Any:
    """Convert a parsed value to the type of its field: lists become tuples."""
    if get_origin(hint) is tuple:
        return tuple(value or ())
    if isinstance(hint, types.UnionType) and value is None:
        return None
    return value


def require_names(**values: str | None) -> None:
    """Raise `ConfigError` for an empty name: it would stand for the current folder."""
    for name, value in values.items():
        if value == "":
            raise ConfigError(f"{name} is empty", expected="a name", got="''")


BlockCache = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="With a URL: folder that caches fetched blocks. Default: $ACTCACHE_BLOCK_CACHE, or "
        "actcache/blocks in the user's cache folder.",
    ),
]
BlockCacheBytes = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**53,
        help="Largest size of the block cache, in bytes. Default: $ACTCACHE_BLOCK_CACHE_BYTES, or "
        "16 GiB.",
    ),
]
