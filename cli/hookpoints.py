"""`actcache hookpoints`: list the modules of a model that can be harvested."""

from __future__ import annotations

from typing import Annotated

import typer

from .error_handling import print_json, report_errors


@report_errors
def run(
    model: Annotated[str, typer.Argument(help="Model id or folder.")],
    pattern: Annotated[
        str | None,
        typer.Argument(
            help="Name or fnmatch pattern; a final ':in' selects inputs. Default: all modules."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Revision (branch, tag or commit) on the Hub.")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Name of a GGUF file in MODEL.")] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run Python code from the model's repository."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the hookpoints of MODEL with their widths, without loading weights where possible."""
    from actcache.config import HarvestConfig
    from actcache.harvester.resolve import probe_model
    from actcache.model.hooks import select
    from actcache.model.loading import load_config

    config = HarvestConfig(
        model,
        dataset="",
        out="",
        revision=revision,
        gguf_file=gguf_file,
        trust_remote_code=trust_remote_code,
    )
    probed, sites, _ = probe_model(config, load_config(config))
    chosen = list(sites.values())
    if pattern is not None:
        chosen = select(pattern, sites, probed.base_model_prefix)
    if json:
        print_json([{"name": s.name, "width": s.width, "reason": s.reason} for s in chosen])
        return
    longest = max((len(site.name) for site in chosen), default=0)
    for site in chosen:
        print(f"{site.name:<{longest}}  {site.width or f'-  ({site.reason})'}")
