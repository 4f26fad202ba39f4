"""Command line of `saetrain fit`: repeatable options of an SAE, and --config files.

It is generated from `FitConfig` as in `options`, with two differences: options of one SAE become
lists, and --config supplies options that the command line omits, so none is required there.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from actcache.core.options import MAIN
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import AXES

from .options import field_docs, flag, frozen, option_fields, parameter

_FIRST = ("cache", "out", "hookpoint")
"""Options that the help lists first."""


def fit_command(run: Callable[[FitConfig, bool, bool], None]) -> Callable[..., None]:
    """Build a function that typer turns into a command; it calls `run(config, plan, json)`."""
    docs, hints = field_docs(FitConfig), get_type_hints(FitConfig)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("ctx", keyword, annotation=typer.Context)]
    fields = {field.name: field for field in option_fields(FitConfig)}
    for name in (*_FIRST, *(name for name in fields if name not in _FIRST)):
        made = parameter(fields[name], hints[name], docs[name], positional=name == "cache")
        hint, info = get_args(made.annotation)
        default: Any = None if made.default is inspect.Parameter.empty else made.default
        if hint is bool:  # so that the command line can override a file with False
            switch = name.replace("_", "-")
            both, group = f"--{switch}/--no-{switch}", info.rich_help_panel
            info = typer.Option(both, help=docs[name], rich_help_panel=group)
        if is_repeatable(name):
            info.help = f"{docs[name]} Repeatable."
            hint = list[_item_type(hint)]  # type: ignore[misc]
            default = None if default is None else [default]
        if default is None:
            hint = hint | None
        parameters.append(made.replace(annotation=Annotated[hint, info], default=default))
    parameters += [flag(name, text) for name, text in _FLAGS.items()]
    parameters.append(inspect.Parameter("config", keyword, default=None, annotation=_CONFIG))

    def invoke(ctx: typer.Context, **values: Any) -> None:
        from pathlib import Path

        from saetrain.runs.config_file import make_config, merge, read_options

        line: dict[str, Any] = {
            name: _plain(value) if is_repeatable(name) else frozen(value, hints.get(name))
            for name, value in values.items()
            if _is_given(ctx, name)
        }
        path = line.pop("config", None)
        flags = dict.fromkeys(_FLAGS, bool)
        options = merge({} if path is None else read_options(Path(path), flags), line)
        plan, as_json = (bool(options.pop(name, False)) for name in _FLAGS)
        run(make_config(options), plan, as_json)

    invoke.__doc__ = run.__doc__
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {p.name: p.annotation for p in parameters}
    return invoke


_FLAGS = {
    "plan": "Print the SAEs with their parameters and memory, without training.",
    "json": "Print a machine-readable summary.",
}

_CONFIG = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=MAIN,
        help="TOML or YAML file with options by name, or the run.json of a run. The command line "
        "overrides it. A table [hookpoints.PATTERN] sets k, lr, num-latents or expansion-factor of "
        "matching hookpoints.",
    ),
]


def is_repeatable(name: str) -> bool:
    """Return whether an option may be given several times, once for each SAE. Flags may not."""
    return name in AXES and get_type_hints(FitConfig)[name] is not bool


def _item_type(hint: Any) -> Any:
    """Return the type of one value of a repeatable option, as typer accepts it in a list."""
    if type(None) in get_args(hint):
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is Literal:  # typer rejects Literal in a list
        return enum.StrEnum("Choice", {choice: choice for choice in get_args(hint)})
    return hint


def _plain(values: list[Any]) -> list[Any]:
    return [value.value if isinstance(value, enum.Enum) else value for value in values]


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
