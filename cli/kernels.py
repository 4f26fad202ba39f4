"""`saetrain kernels`: report the backend that each function of the training step uses."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .error_handling import print_json, report_errors
from .tables import table


@report_errors
def run(
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Print the backend of each function. This is the default."),
    ] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda. Default: cuda if there is a GPU.")] = "",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"],
        typer.Option(help="Dtype of matrix products; bfloat16 for a run with --autocast."),
    ] = "float32",
    tokens: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Rows of a batch.")] = 8192,
    d_in: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Width of a row.")] = 768,
    num_latents: Annotated[
        int, typer.Option(min=1, max=2**31 - 1, help="Number of latents.")
    ] = 24576,
    k: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Active latents of a row.")] = 32,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print each kernel's backend; $SAETRAIN_KERNELS forces reference, torch or triton."""
    del explain
    import torch

    from actcache.errors import ConfigError
    from saetrain.kernels.explain import explain as explain_kernels

    if k > num_latents:
        raise ConfigError("--k is above --num-latents", expected=f"<= {num_latents}", got=k)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device)
        choices = explain_kernels(kind, getattr(torch, dtype), (tokens, d_in, num_latents, k))
    except (RuntimeError, ValueError) as error:
        raise ConfigError("no backend can be chosen", got=str(error).splitlines()[0]) from error
    if json:
        print_json([choice._asdict() for choice in choices])
        return
    print(table(["function", "path", "how"], [list(choice) for choice in choices]))
