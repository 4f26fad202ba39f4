"""The two programs and their commands. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Annotated

import typer

from actcache.config import ConvertConfig, HarvestConfig, PlanConfig

from . import bench, convert, fit, harvest, hookpoints, kernels, plan, verify
from . import eval as eval_
from .error_handling import report_errors
from .fit_options import fit_command
from .inspect import command as inspect_cache
from .options import command


def _app(text: str) -> typer.Typer:
    """A program with plain help: rich text would cost a tenth of a second at every start."""
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
        del version  # its callback has done the work

    return app


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("actcache"))
        raise typer.Exit


def actcache_app() -> typer.Typer:
    """The program `actcache`."""
    app = _app("Harvest a model's activations once, and look at them.")
    app.command("harvest")(report_errors(command(HarvestConfig, harvest.run, ["model", "dataset"])))
    app.command("plan")(report_errors(command(PlanConfig, plan.run, ["model", "dataset"])))
    app.command("convert")(report_errors(command(ConvertConfig, convert.run, ["source"])))
    app.command("hookpoints")(hookpoints.run)
    app.command("inspect")(inspect_cache.run)
    app.command("verify")(verify.run)
    app.command("bench")(bench.run)
    return app


def saetrain_app() -> typer.Typer:
    """The program `saetrain`."""
    app = _app("Train sparse autoencoders from a cache of activations.")
    app.command("fit")(report_errors(fit_command(fit.run)))
    app.command("eval")(eval_.run)
    app.command("kernels")(kernels.run)
    return app


def actcache() -> None:
    """Console script `actcache`."""
    actcache_app()()


def saetrain() -> None:
    """Console script `saetrain`."""
    saetrain_app()()
