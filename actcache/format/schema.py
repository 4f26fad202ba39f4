"""Which tensors the files of a shard hold beside its rows: names, shapes and types.

Letters: S sequences of the shard, C context length, N rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from actcache.format.manifest import Hookpoint
from actcache.format.statistics import NORM_BINS


def token_tensors(sequences: int, ctx_len: int, rows: int) -> dict[str, Spec]:
    """Of a shard's text."""
    ids, count, row = (sequences, ctx_len), (sequences,), (rows,)
    return {
        "tokens": (ids, "<i4", "I32"),  # [S, C]
        "lengths": (count, "<i4", "I32"),  # [S]
        "documents": (count, "<i8", "I64"),  # [S]
        "starts": (count, "<i8", "I64"),  # [S]
        "row_sequence": (row, "<i4", "I32"),  # [N]
        "row_position": (row, "<i4", "I32"),  # [N]
    }


def statistics_tensors(hookpoints: Sequence[Hookpoint]) -> dict[str, Spec]:
    """Of a shard's statistics."""
    specs: dict[str, Spec] = {}
    for point in hookpoints:
        for name in ("sum", "sum_squares", "abs_max"):
            specs[f"{point.name}/{name}"] = ((point.width,), "<f8", "F64")  # [D]
        specs[f"{point.name}/norm_sum_max"] = ((2,), "<f8", "F64")
        specs[f"{point.name}/norm_histogram"] = ((NORM_BINS,), "<i8", "I64")
    return specs


Spec = tuple[tuple[int, ...], str, str]
"""What a tensor is: (shape, NumPy type, safetensors tag)."""
