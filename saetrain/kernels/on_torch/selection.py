"""The k largest of each row, by tile maxima.

All of a row's k largest lie within the k tiles with the largest maxima: a tile outside those has k
maxima above all that it holds. So most of a row is read once, by a maximum, and only k tiles of it
are looked through. These are cut into tiles once more. Letters: N rows, M num_latents, K k.
"""

import torch
from torch import Tensor

_TILES = (64, 32)
_INNER = 8
_SHARE = 4  # tiles pay where they leave a quarter of a row, or less


def topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in any order: values [N, k], indices [N, k] int64.

    Which of equal values are taken is not said. A row with a NaN gives NaN for all values.
    """
    tile = tile_of(pre_acts, k)
    values, indices = _plain(pre_acts, k) if tile is None else _by_tiles(pre_acts, k, tile)
    # A NaN is above all else: where there is one in a row, one has been selected.
    spoiled = values.isnan().any(dim=1, keepdim=True)
    return values.masked_fill(spoiled, torch.nan), indices


def tile_of(pre_acts: Tensor, k: int, device: str | None = None) -> int | None:
    """Latents in a tile; None: `torch.topk` is faster."""
    if (
        (device or pre_acts.device.type) != "cpu"
        or pre_acts.dtype == torch.float64
        or len(pre_acts) == 0
    ):
        return None
    M = pre_acts.shape[1]
    return next((tile for tile in _TILES if k * tile * _SHARE <= M), None)


def _by_tiles(pre_acts: Tensor, k: int, tile: int) -> tuple[Tensor, Tensor]:
    N, M = pre_acts.shape
    pre_acts = pre_acts.contiguous()
    tiles = M // tile
    whole = tiles * tile
    tiled = pre_acts[:, :whole].reshape(N, tiles, tile)
    _, best = _plain(_maxima(tiled), k)  # [N, K]
    # Any stretch of numbers as long as a tile, by where it begins.
    stretches = pre_acts.as_strided((N * M - tile + 1, tile), (1, 1))
    starts = M * torch.arange(N, device=best.device).unsqueeze(1) + tile * best  # [N, K]
    held = stretches.index_select(0, starts.flatten()).view(N, k * tile)
    values, chosen = _inner(held, k)
    indices = tile * best.gather(1, chosen // tile) + chosen % tile
    if whole == M:
        return values, indices
    # What is left of a row without a tile of its own goes on to the last round.
    rest = torch.arange(whole, M, device=best.device).expand(N, -1)
    values, chosen = _plain(torch.cat([values, pre_acts[:, whole:]], dim=1), k)
    return values, torch.cat([indices, rest], dim=1).gather(1, chosen)


def _inner(held: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of [N, L], by tiles of every (L/8)-th."""
    N, length = held.shape
    step = length // _INNER
    _, best = _plain(held.view(N, _INNER, step).amax(dim=1), k)  # [N, K]
    starts = step * torch.arange(_INNER, device=held.device).view(1, _INNER, 1)
    place = (best.unsqueeze(1) + starts).flatten(1)  # [N, 8 K]
    values, chosen = _plain(held.gather(1, place), k)
    return values, place.gather(1, chosen)


def _maxima(tiled: Tensor) -> Tensor:
    """[N, T, tile] to [N, T], NaN where there is one."""
    if tiled.dtype == torch.float32:
        return tiled.amax(dim=2)
    # amax of 16 bits is slow; maxima of halves are not, down to where the rest can be widened.
    while tiled.shape[2] > _INNER:
        low, high = tiled.chunk(2, dim=2)
        tiled = torch.maximum(low, high)
    return tiled.float().amax(dim=2)


def _plain(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.topk(values, k, dim=1, sorted=False)


def batch_topk_threshold(pre_acts: Tensor, count: int) -> Tensor:
    """The count-th largest of all N*M values, no dimensions; NaN if there is one among them."""
    values = torch.topk(pre_acts.flatten(), count, sorted=False).values  # [count]
    return values.min()  # NaN if one is among them, and one is if there is any


def group_max(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest of each of k groups of M/k neighbours, the first of equals, in their order.

    Values [N, k], indices [N, k] int64. A group with a NaN gives NaN.
    """
    size = pre_acts.shape[1] // k
    values, within = pre_acts.view(len(pre_acts), k, size).max(dim=-1)  # [N, K]
    return values, within + size * torch.arange(k, device=within.device)
