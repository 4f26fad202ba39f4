"""`actcache hookpoints`: list the modules of a model that can be harvested."""

from __future__ import annotations

from typing import Annotated

import typer

from .error_handling import only_results_on_stdout, print_json, print_stderr, report_errors
from .tables import table


@report_errors
def run(
    model: Annotated[str, typer.Argument(help="Model id or folder.")],
    pattern: Annotated[
        str | None,
        typer.Argument(
            help="Name or fnmatch pattern, also of another library; a final ':in' selects inputs. "
            "Default: all modules."
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
    """List the hookpoints of MODEL, without loading weights where possible.

    Beside each: its width, and the names that other libraries have for it: sparsify and nnsight the
    module's path, TransformerLens and SAELens that of a hook. --hookpoint takes them all.
    """
    from actcache.config import HarvestConfig
    from actcache.core.process import captured_warnings
    from actcache.format.manifest import INPUT
    from actcache.harvester.resolve import probe_model
    from actcache.model.hooks import layout_of, select
    from actcache.model.loading import load_config

    config = HarvestConfig(
        model,
        dataset="",
        out="",
        revision=revision,
        gguf_file=gguf_file,
        trust_remote_code=trust_remote_code,
    )
    with only_results_on_stdout(), captured_warnings() as captured:
        probed, sites, _ = probe_model(config, load_config(config))
    for warning in captured.lines:
        print_stderr(f"warning: {warning}")
    chosen = list(sites.values())
    if pattern is not None:
        chosen = select(pattern, sites, probed)
    layout = layout_of(probed)
    peers = layout.peers() if layout is not None else {}
    base = f"{probed.base_model_prefix}." if probed.base_model_prefix else ""
    if json:
        print_json(
            [
                {
                    "name": site.name,
                    "width": site.width,
                    "reason": site.reason,
                    "module": base + site.name.removesuffix(INPUT),
                    "transformer_lens": peers.get(site.name, []),
                }
                for site in chosen
            ]
        )
        return
    rows = [
        [
            site.name,
            str(site.width or "-"),
            base + site.name.removesuffix(INPUT),
            ", ".join(peers.get(site.name, [])[:2]) or (f"({site.reason})" if site.reason else ""),
        ]
        for site in chosen
    ]
    print(table(["hookpoint", "width", "module", "TransformerLens"], rows))
