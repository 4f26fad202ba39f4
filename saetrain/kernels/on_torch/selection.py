"""Selection of the k largest of each row, by tile maxima.

All of a row's k largest lie within the k tiles with the largest maxima: a tile outside those has k
maxima above all its numbers. So most of a row is read once, by a maximum, and only k tiles of it
are searched. These are cut into tiles once more. Letters: N rows, M num_latents, K k.
"""

import torch
from torch import Tensor

_TILES = (64, 32)
_INNER = 8
_SHARE = 4  # tiles pay where they leave a quarter of a row, or less


def topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the k largest of each row, in any order: values [N, k], indices [N, k] int64.

    Of equal values, any may be taken. A row with a NaN gives NaN for all values.
    """
    tile = tile_of(pre_acts, k)
    values, indices = _plain(pre_acts, k) if tile is None else _by_tiles(pre_acts, k, tile)
    # torch sorts NaN above all else: if a row has one, one has been selected.
    has_nan = values.isnan().any(dim=1, keepdim=True)
    return values.masked_fill(has_nan, torch.nan), indices


def tile_of(pre_acts: Tensor, k: int, device: str | None = None) -> int | None:
    """Return the number of latents in a tile; None: `torch.topk` is faster."""
    on_cpu = (device or pre_acts.device.type) == "cpu"
    if on_cpu and pre_acts.dtype != torch.float64 and len(pre_acts):
        for tile in _TILES:
            if k * tile * _SHARE <= pre_acts.shape[1]:
                return tile
    return None


def _by_tiles(pre_acts: Tensor, k: int, tile: int) -> tuple[Tensor, Tensor]:
    N, M = pre_acts.shape
    pre_acts = pre_acts.contiguous()
    tiles = M // tile
    whole = tiles * tile
    tiled = pre_acts[:, :whole].reshape(N, tiles, tile)
    _, best = _plain(_maxima(tiled), k)  # [N, K]
    # Every range of numbers as long as a tile, indexed by its first position.
    ranges = pre_acts.as_strided((N * M - tile + 1, tile), (1, 1))
    starts = M * torch.arange(N, device=best.device).unsqueeze(1) + tile * best  # [N, K]
    held = ranges.index_select(0, starts.flatten()).view(N, k * tile)
    values, chosen = _inner(held, k)
    indices = tile * best.gather(1, chosen // tile) + chosen % tile
    if whole == M:
        return values, indices
    # The rest of a row, shorter than a tile, takes part in the last selection.
    rest = torch.arange(whole, M, device=best.device).expand(N, -1)
    values, chosen = _plain(torch.cat([values, pre_acts[:, whole:]], dim=1), k)
    return values, torch.cat([indices, rest], dim=1).gather(1, chosen)


def _inner(held: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the k largest of [N, L], by tiles that hold every (L/8)-th number."""
    N, length = held.shape
    step = length // _INNER
    _, best = _plain(held.view(N, _INNER, step).amax(dim=1), k)  # [N, K]
    starts = step * torch.arange(_INNER, device=held.device).view(1, _INNER, 1)
    position = (best.unsqueeze(1) + starts).flatten(1)  # [N, 8 K]
    values, chosen = _plain(held.gather(1, position), k)
    return values, position.gather(1, chosen)


def _maxima(tiled: Tensor) -> Tensor:
    """Reduce [N, T, tile] to the maxima [N, T], NaN where a tile has one."""
    if tiled.dtype == torch.float32:
        return tiled.amax(dim=2)
    # amax of 16 bits is slow; maxima of halves are fast, until the rest is small enough to widen.
    while tiled.shape[2] > _INNER:
        low, high = tiled.chunk(2, dim=2)
        tiled = torch.maximum(low, high)
    return tiled.float().amax(dim=2)


def _plain(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.topk(values, k, dim=1, sorted=False)


def batch_topk_threshold(pre_acts: Tensor, count: int) -> Tensor:
    """Find the count-th largest of all N*M values, no dimensions; NaN if any of them is."""
    values = torch.topk(pre_acts.flatten(), count, sorted=False).values  # [count]
    return values.min()  # NaN if any value is: torch selects NaN first


def group_max(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the largest of each of k groups of M/k neighbours, the first of equals, in order.

    Values [N, k], indices [N, k] int64. A group with a NaN gives NaN.
    """
    size = pre_acts.shape[1] // k
    values, within = pre_acts.view(len(pre_acts), k, size).max(dim=-1)  # [N, K]
    return values, within + size * torch.arange(k, device=within.device)
