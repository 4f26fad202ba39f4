"""The two programs and their commands. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from actcache.config import ConvertConfig, HarvestConfig, PlanConfig

from . import bench, convert, fit, harvest, hookpoints, kernels, plan, verify
from . import eval as eval_
from .error_handling import report_errors
from .fit_options import fit_command
from .inspect import command as inspect_cache
from .options import GroupedCommand, command


def _app(text: str) -> typer.Typer:
    """Build a program with plain help. Rich text would add 0.1 s to every start."""
    app = typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback()
    def options(
        version: Annotated[
            bool,
            typer.Option("--version", help="Show the version.", is_eager=True, callback=_version),
        ] = False,
    ) -> None:
        del version  # handled by its callback

    return app


def _version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        print(version("actcache"))
        raise typer.Exit


def _add(app: typer.Typer, name: str, run: Callable[..., None], *example: str) -> None:
    """Add a command whose help lists its options in groups and ends with an example."""
    epilog = "\b\n" + "\n".join(["Example:", *(f"  {line}" for line in example)])
    app.command(name, cls=GroupedCommand, epilog=epilog)(run)


def actcache_app() -> typer.Typer:
    """Build the program `actcache`."""
    app = _app("Harvest a model's activations into a cache, and inspect it.")
    positional = ["model", "dataset"]
    _add(
        app,
        "harvest",
        report_errors(command(HarvestConfig, harvest.run, positional)),
        "actcache harvest HuggingFaceTB/SmolLM2-135M text.jsonl --layers 9 \\",
        "    --ctx-len 256 --max-tokens 10000000 --out cache",
    )
    _add(
        app,
        "plan",
        report_errors(command(PlanConfig, plan.run, positional)),
        "actcache plan HuggingFaceTB/SmolLM2-135M text.jsonl --layers 9 --ctx-len 256",
    )
    _add(
        app,
        "convert",
        report_errors(command(ConvertConfig, convert.run, ["source"])),
        "actcache convert cache --out small --dtype int8 --backend zarr",
    )
    _add(app, "hookpoints", hookpoints.run, "actcache hookpoints HuggingFaceTB/SmolLM2-135M")
    _add(app, "inspect", inspect_cache.run, "actcache inspect cache --html cache.html")
    _add(app, "verify", verify.run, "actcache verify cache --quick")
    _add(app, "bench", bench.run, "actcache bench cache")
    return app


def saetrain_app() -> typer.Typer:
    """Build the program `saetrain`."""
    app = _app("Train sparse autoencoders from a cache of activations.")
    _add(
        app,
        "fit",
        report_errors(fit_command(fit.run)),
        "saetrain fit cache --out run --k 32 --k 64 --num-latents 16384",
    )
    _add(app, "eval", eval_.run, "saetrain eval run")
    _add(app, "kernels", kernels.run, "saetrain kernels")
    return app
