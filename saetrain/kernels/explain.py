"""Which path each function takes. Letters: N tokens, D d_in, M num_latents, K k."""

from typing import NamedTuple

import torch

from saetrain.kernels.backends import select_backend
from saetrain.kernels.encode import tokens_at_once
from saetrain.kernels.matmul import by_onednn
from saetrain.kernels.on_torch.selection import tile_of


class Choice(NamedTuple):
    """One function, and what serves it."""

    function: str
    path: str
    how: str


def explain(
    device: torch.device | str, dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> list[Choice]:
    """Say what serves each function for tensors of a device, dtype and sizes; runs nothing.

    Args:
        device: of all tensors.
        dtype: of the products; under autocast, autocast's.
        sizes: N, D, M and K.

    Raises:
        ValueError: SAETRAIN_KERNELS names no path, or one that cannot serve there.
    """
    N, D, M, _ = sizes
    kind = torch.device(device).type
    path = select_backend(_Somewhere(kind))  # type: ignore[arg-type]
    W = torch.empty(M, D, dtype=dtype, device="meta")
    product = "oneDNN" if kind == "cpu" and by_onednn(W, kind) else "torch's linear"
    rows = tokens_at_once(N, W, kind)
    if path == "reference":
        found = _plainly()
    else:
        found = _by_triton(dtype, sizes) if path == "triton" else _by_torch(kind, dtype, sizes)
    return [
        Choice("product", "torch", f"{product}, {rows:,} tokens at once"),
        *(Choice(name, path if by is None else by, text) for name, (text, by) in found.items()),
    ]


Ways = dict[str, tuple[str, str | None]]
"""By function, how, and by which path if that is another than the one chosen."""


def _plainly() -> Ways:
    text = "plain PyTorch, differentiated by autograd"
    return dict.fromkeys(_FUNCTIONS, (text, None)) | {"sort_pairs": ("torch.sort", "torch")}


def _by_torch(kind: str, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> Ways:
    N, _, M, K = sizes
    on_cpu = kind == "cpu"
    tile = tile_of(torch.empty(N, M, dtype=dtype, device="meta"), K, kind)
    tiles = f"tiles of {tile}" if tile else "torch.topk"
    said = {
        "topk": tiles,
        "batch_topk": f"{tiles} of each row, then torch.topk",
        "group_max": "torch.max",
        "gather_sum": "embedding bag of a token",
        "gather_dot": "gradient of an embedding bag" + (", sorted by latent" if on_cpu else ""),
        "scatter_outer": "embedding bag of a latent" + (", in pieces of 64" if on_cpu else ""),
        "scatter_sum": "embedding bag of a latent, in float64",
        "weight_gradients": "scatter_outer of both weights, from one sort",
        "sort_pairs": "torch.sort",
        "signum_update_": "in place" + (", some rows at a time" if on_cpu else ""),
        "adam_update_": "torch's fused Adam" + (", some rows at a time" if on_cpu else ""),
    }
    return {name: (said[name], None) for name in _FUNCTIONS}


def _by_triton(dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> Ways:
    from saetrain.kernels.on_triton.decode import cached_bytes
    from saetrain.kernels.on_triton.keys import DTYPES
    from saetrain.kernels.on_triton.launch import columns
    from saetrain.kernels.on_triton.segments import CHUNK, PIECE, ROW_BYTES
    from saetrain.kernels.on_triton.topk import MOST_K, tile_width
    from saetrain.kernels.on_triton.update import BLOCK

    _, D, M, K = sizes
    keys = dtype in DTYPES  # of a type that is compared as whole numbers
    gathered, _ = columns(D, dtype, cached_bytes(M))
    summed, _ = columns(D, dtype, ROW_BYTES)
    prefix_groups = f"a program for a latent and {summed} columns, in pieces of {PIECE}"
    update = f"a row at once, of up to {BLOCK:,}" if D <= BLOCK else "a row in three passes"
    of_update: tuple[str, str | None] = (update, None)
    if dtype == torch.float64:
        of_update = ("plain PyTorch", "reference")
    selectors: Ways = {
        "topk": (f"tiles of {tile_width(M, K)}, keys bit by bit", None),
        "batch_topk": ("threshold by digits of keys, among the largest tiles", None),
        "group_max": ("a program for some groups of a row", None),
        "gather_sum": (f"a program for a token and {gathered} columns", None),
        "gather_dot": (f"a program for a token and {gathered} columns, sums added after", None),
        "scatter_outer": (f"{prefix_groups}; latents of over {CHUNK} pairs by chunks", None),
        "scatter_sum": (f"a program for a latent, in pieces of {PIECE}", None),
        "weight_gradients": ("as scatter_outer, both weights at once", None),
        "sort_pairs": ("torch.sort", "torch"),
        "signum_update_": of_update,
        "adam_update_": of_update,
    }
    if not keys or K > MOST_K:
        selectors["topk"] = ("torch.topk", "torch")
    if not keys:
        selectors |= {"batch_topk": ("torch.topk", "torch"), "group_max": ("torch.max", "torch")}
    return selectors


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


class _Somewhere:
    """A tensor on a device that this machine need not have."""

    def __init__(self, kind: str) -> None:
        self.is_cuda, self.device = kind == "cuda", kind
