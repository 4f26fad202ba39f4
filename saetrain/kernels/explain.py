"""Which path each function takes. Letters: N tokens, D d_in, M num_latents, K k."""

from typing import NamedTuple

import torch

from saetrain.kernels.encode import tokens_at_once
from saetrain.kernels.on_torch.topk import tile_of
from saetrain.kernels.paths import chosen_path
from saetrain.kernels.product import by_onednn


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
    N, D, M, K = sizes
    kind = torch.device(device).type
    path = chosen_path(_Somewhere(kind))  # type: ignore[arg-type]
    how = {
        "reference": "plain PyTorch, differentiated by autograd",
        "triton": "Triton kernel",
    }.get(path)
    W = torch.empty(M, D, dtype=dtype, device="meta")
    pre_acts = torch.empty(N, M, dtype=dtype, device="meta")
    on_cpu = kind == "cpu"
    rows = tokens_at_once(N, W, kind)
    tile = tile_of(pre_acts, K, kind)
    product = "oneDNN" if on_cpu and by_onednn(W, kind) else "torch's linear"
    tiles = f"tiles of {tile}" if tile else "torch.topk"
    functions = {
        "topk": tiles,
        "batch_topk": f"{tiles} of each row, then torch.topk",
        "group_max": "torch.max",
        "gather_sum": "embedding bag of a token",
        "gather_dot": "gradient of an embedding bag" + (", sorted by latent" if on_cpu else ""),
        "scatter_outer": "embedding bag of a latent" + (", in pieces of 64" if on_cpu else ""),
        "scatter_sum": "embedding bag of a latent, in float64",
        "sort_pairs": "torch.sort",
        "signum_update_": "in place" + (", some rows at a time" if on_cpu else ""),
        "adam_update_": "torch's fused Adam" + (", some rows at a time" if on_cpu else ""),
    }
    found = [Choice("product", "torch", f"{product}, {rows:,} tokens at once")]
    for function, by_torch in functions.items():
        if function == "sort_pairs":
            found.append(Choice(function, "torch", by_torch))
        else:
            found.append(Choice(function, path, how or by_torch))
    return found


class _Somewhere:
    """A tensor on a device that this machine need not have."""

    def __init__(self, kind: str) -> None:
        self.is_cuda, self.device = kind == "cuda", kind
