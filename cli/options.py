"""A command line made of a configuration: each field is an option, its docstring the help.

So an option is written down once, where the library reads it. Only the standard library, typer and
the configuration's own module are imported: `--help` must not wait for torch.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

C = TypeVar("C")


def command(
    config_class: type[C], run: Callable[[C, bool], None], positional: Sequence[str]
) -> Callable[..., None]:
    """A function whose signature typer turns into options, and which calls `run(config, json)`.

    Args:
        config_class: a dataclass of str, int, float, bool, Literal, None-able and tuple fields.
        run: the command; its second argument is `--json`.
        positional: fields that are arguments instead of options.
    """
    docs = field_docs(config_class)
    hints = get_type_hints(config_class)
    parameters = [
        parameter(field, hints[field.name], docs[field.name], field.name in positional)
        for field in option_fields(config_class)
    ]
    as_json = Annotated[bool, typer.Option("--json", help="Print a machine-readable summary.")]
    parameters.append(
        inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=as_json)
    )

    @functools.wraps(run)
    def invoke(**values: Any) -> None:
        as_json = values.pop("json")
        run(config_class(**{k: frozen(v, hints[k]) for k, v in values.items()}), as_json)

    del invoke.__wrapped__  # typer would look through it, at the signature of `run`
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {p.name: p.annotation for p in parameters}
    return invoke


def field_docs(config_class: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass and of those it extends, as one paragraph."""
    base = config_class.__base__
    docs = field_docs(base) if base is not None and dataclasses.is_dataclass(base) else {}
    (class_,) = ast.parse(inspect.getsource(config_class)).body
    assert isinstance(class_, ast.ClassDef)
    for field, text in zip(class_.body, class_.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


def option_fields(config_class: type[Any]) -> list[dataclasses.Field[Any]]:
    """The fields that are options: all, unless their metadata says otherwise."""
    fields = dataclasses.fields(config_class)
    return [field for field in fields if field.metadata.get("option", True)]


def parameter(
    field: dataclasses.Field[Any], hint: Any, doc: str, positional: bool
) -> inspect.Parameter:
    """What typer makes an option, or an argument, of."""
    name = field.name
    kind = inspect.Parameter.KEYWORD_ONLY
    annotation: Any
    if positional:
        annotation = Annotated[hint, typer.Argument(help=doc, metavar=name.upper())]
        return inspect.Parameter(name, kind, annotation=annotation)
    option = typer.Option("--" + name.replace("_", "-"), help=doc)
    default: Any = field.default
    if get_origin(hint) is tuple:
        item: Any = get_args(hint)[0]
        hint, default = list[item], list(default)
    annotation = Annotated[hint, option]
    if default is dataclasses.MISSING:
        return inspect.Parameter(name, kind, annotation=annotation)
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def frozen(value: Any, hint: Any) -> Any:
    """A value as the configuration holds it."""
    if get_origin(hint) is tuple:
        return tuple(value or ())
    if isinstance(hint, types.UnionType) and value is None:
        return None
    return value


BlockCache = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="With a URL: folder for blocks that were fetched. Default: $ACTCACHE_BLOCK_CACHE, or "
        "actcache/blocks in the user's folder for caches.",
    ),
]
BlockCacheBytes = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Bytes that it may hold. Default: $ACTCACHE_BLOCK_CACHE_BYTES, or 16 GiB.",
    ),
]
