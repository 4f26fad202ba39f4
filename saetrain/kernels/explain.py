"""A description of the backend and algorithm that each function takes, for `saetrain kernels`.

Letters: N tokens, D d_in, M num_latents, K k.
"""

from typing import NamedTuple

import torch

from saetrain.kernels.backends import select_backend
from saetrain.kernels.dense import by_onednn, products_from, tokens_at_once
from saetrain.kernels.on_torch.decode import PIECE
from saetrain.kernels.on_torch.selection import tile_of


class Choice(NamedTuple):
    """One function, the backend that serves it, and how."""

    function: str
    path: str
    how: str


_FUNCTIONS = (
    "topk",
    "batch_topk",
    "group_max",
    "gather_sum",
    "gather_dot",
    "scatter_outer",
    "scatter_sum",
    "weight_gradients",
    "sort_pairs",
    "signum_update_",
    "adam_update_",
)


def explain(
    device: torch.device | str, dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> list[Choice]:
    """Describe what serves each function for tensors of a device, dtype and sizes; runs nothing.

    Args:
        device: device of all tensors, which need not exist here.
        dtype: type of the products; under autocast, autocast's.
        sizes: N, D, M and K.

    Raises:
        ValueError: SAETRAIN_KERNELS names no backend, or one that cannot serve there.
    """
    N, D, M, K = sizes
    kind = torch.device(device).type
    backend = select_backend(_OnDevice(kind))  # type: ignore[arg-type]
    W = torch.empty(M, D, dtype=dtype, device="meta")
    product = "oneDNN" if kind == "cpu" and by_onednn(W, kind) else "torch's linear"
    choices = [
        Choice("product", "torch", f"{product}, {tokens_at_once(N, W, kind):,} tokens at once")
    ]
    if backend == "reference":
        how = dict.fromkeys(_FUNCTIONS, "plain PyTorch, differentiated by autograd")
        how["sort_pairs"], others = "torch.sort", {"sort_pairs": "torch"}
    elif backend == "triton":
        how, others = _by_triton(dtype, sizes)
        many = products_from(M, D, D, dtype)
        if kind == "cuda" and many <= K:
            for name in ("gather_sum", "gather_dot", "weight_gradients"):
                how[name] = f"dense products, as from {many:,} pairs of a token on"
                others[name] = "torch"
    else:
        how, others = _by_torch(kind, dtype, sizes), {}
    return choices + [Choice(name, others.get(name, backend), how[name]) for name in _FUNCTIONS]


def _by_torch(kind: str, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> dict[str, str]:
    N, _, M, K = sizes
    on_cpu = kind == "cpu"
    tile = tile_of(torch.empty(N, M, dtype=dtype, device="meta"), K, kind)
    tiles = f"tiles of {tile}" if tile else "torch.topk"
    rows = ", some rows at a time" if on_cpu else ""
    return {
        "topk": tiles,
        "batch_topk": f"{tiles} of each row, then torch.topk",
        "group_max": "torch.max",
        "gather_sum": "embedding bag of a token",
        "gather_dot": "gradient of an embedding bag" + (", sorted by latent" if on_cpu else ""),
        "scatter_outer": "embedding bag of a latent"
        + (f", in pieces of {PIECE}" if on_cpu else ""),
        "scatter_sum": "embedding bag of a latent, in float64",
        "weight_gradients": "scatter_outer of both weights, from one sort",
        "sort_pairs": "torch.sort",
        "signum_update_": "in place" + rows,
        "adam_update_": "torch's fused Adam" + rows,
    }


def _by_triton(
    dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> tuple[dict[str, str], dict[str, str]]:
    """Describe the functions, and name the other backends that serve some of them."""
    from saetrain.kernels.on_triton.decode import cached_bytes
    from saetrain.kernels.on_triton.keys import DTYPES
    from saetrain.kernels.on_triton.launch import columns
    from saetrain.kernels.on_triton.segments import CHUNK, PIECE, ROW_BYTES
    from saetrain.kernels.on_triton.topk import MOST_K, tile_width
    from saetrain.kernels.on_triton.update import BLOCK

    _, D, M, K = sizes
    gathered, _ = columns(D, dtype, cached_bytes(M))
    summed, _ = columns(D, dtype, ROW_BYTES)
    latent = f"a program for a latent and {summed} columns, in pieces of {PIECE}"
    update = f"a row at once, of up to {BLOCK:,}" if D <= BLOCK else "a row in three passes"
    how = {
        "topk": f"tiles of {tile_width(M, K)}, keys bit by bit",
        "batch_topk": "threshold by digits of keys, among the largest tiles",
        "group_max": "a program for some groups of a row",
        "gather_sum": f"a program for a token and {gathered} columns",
        "gather_dot": f"a program for a token and {gathered} columns, sums added after",
        "scatter_outer": f"{latent}; latents of over {CHUNK} pairs by chunks",
        "scatter_sum": f"a program for a latent, in pieces of {PIECE}",
        "weight_gradients": "as scatter_outer, both weights at once",
        "sort_pairs": "torch.sort",
        "signum_update_": update,
        "adam_update_": update,
    }
    others = {"sort_pairs": "torch"}
    keys = dtype in DTYPES  # types that are compared as whole numbers
    if not keys or K > MOST_K:
        how["topk"], others["topk"] = "torch.topk", "torch"
    if not keys:
        how |= {"batch_topk": "torch.topk", "group_max": "torch.max"}
        others |= {"batch_topk": "torch", "group_max": "torch"}
    if dtype == torch.float64:
        for name in ("signum_update_", "adam_update_"):
            how[name], others[name] = "plain PyTorch", "reference"
    return how, others


class _OnDevice:
    """A tensor on a device that this machine need not have, as far as `select_backend` reads it."""

    def __init__(self, kind: str) -> None:
        self.is_cuda, self.device = kind == "cuda", kind
