"""Types on disk and in memory. Little-endian throughout; bfloat16 travels as uint16 in NumPy.

A row as stored has one part, its numbers, or two: an 8-bit row has a scale besides. `StoredRows`
holds the parts of some rows, `RowDtype.parts` says what they are, and everything that moves rows
(backends, reader, stream) moves parts without asking which there are.

Letters: N rows, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError

if TYPE_CHECKING:
    import torch


Array = NDArray[Any]

VALUES = "activations"
"""The part that every row has: its numbers. Files and tensors are called so."""
SCALES = "scales"
"""What the numbers of an 8-bit row are multiplied by: a float32 for each row."""

_BLOCK = (1 << 15) - 1
"""Numbers that are encoded at once: too few for torch to share them among its threads, which under
load wait for one another up to twenty times longer than one needs for all."""

_WHOLE = 1.5 * 2**23  # float32 numbers about this size are whole


@dataclass(frozen=True)
class RowComponent:
    """What one part of a row is."""

    shape: tuple[int, ...]
    """Of one row: (width,), or () for a scale."""
    storage: str
    """NumPy type of the bytes."""
    tag: str
    """Type in a safetensors header."""

    @property
    def bytes(self) -> int:
        """Of one row."""
        return math.prod(self.shape) * np.dtype(self.storage).itemsize


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Some rows as they lie on disk. Indexing chooses rows, in all parts alike."""

    parts: Mapping[str, Array]
    """By name, in the order of the bytes. Each [N, ...]"""

    @property
    def values(self) -> Array:
        """The stored numbers. [N, D]"""
        return self.parts[VALUES]

    @property
    def scales(self) -> NDArray[np.float32]:
        """Of 8-bit rows. [N]"""
        return self.parts[SCALES]

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Array) -> StoredRows:
        return StoredRows({name: part[rows] for name, part in self.parts.items()})

    def __setitem__(self, rows: slice | Array, other: StoredRows) -> None:
        for name, part in self.parts.items():
            part[rows] = other.parts[name]

    def take(self, rows: NDArray[np.int64], out: StoredRows) -> None:
        """Copy rows, whose numbers are in range, to `out`."""
        for name, part in self.parts.items():
            # mode='clip' lets NumPy write straight into `out`.
            np.take(part, rows, axis=0, out=out.parts[name], mode="clip")


@dataclass(frozen=True)
class RowDtype:
    """One type of activations: how NumPy, safetensors and torch call it."""

    name: str
    """The manifest's."""
    storage: str
    """NumPy type of the bytes."""
    tag: str
    """Type in a safetensors header."""
    torch_name: str
    """Torch's type of the numbers."""
    bridge_dtype: str
    """Type through which they pass from NumPy to torch, which both have under this name."""

    @property
    def decodes(self) -> bool:
        """Whether `to_torch` gives other numbers than those stored: float32, in new memory."""
        return False

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return np.dtype(self.storage).itemsize

    def parts(self, width: int) -> dict[str, RowComponent]:
        """What a row of `width` numbers consists of, in the order of the bytes."""
        return {VALUES: RowComponent((width,), self.storage, self.tag)}

    def row_bytes(self, width: int) -> int:
        """Bytes of one row, all parts together."""
        return sum(part.bytes for part in self.parts(width).values())

    def empty(self, rows: int, width: int) -> StoredRows:
        """Memory for rows that will be read or computed."""
        return StoredRows(
            {
                name: np.empty((rows, *part.shape), dtype=part.storage)
                for name, part in self.parts(width).items()
            }
        )

    def to_float32(self, rows: StoredRows) -> NDArray[np.float32]:
        """The numbers that stored rows stand for, [N, D]; exact for every type here."""
        if self.name == "bfloat16":  # the upper half of a float32
            return (rows.values.astype(np.uint32) << 16).view(np.float32)
        return rows.values.astype(np.float32)

    def tensors(self, rows: StoredRows) -> dict[str, torch.Tensor]:
        """The parts of stored rows as tensors that share their memory, for `decode`."""
        import torch

        return {
            name: torch.from_numpy(part.view(self.bridge_dtype) if name == VALUES else part)
            for name, part in rows.parts.items()
        }

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What `tensors` gave, or a copy of it on any device, as a tensor of this type. [N, D]"""
        import torch

        return parts[VALUES].view(getattr(torch, self.torch_name))

    def to_torch(self, rows: StoredRows) -> torch.Tensor:
        """Stored rows as a tensor of this type that shares their memory; of 8 bits, as `decode`."""
        return self.decode(self.tensors(rows))

    def from_torch(self, rows: torch.Tensor) -> StoredRows:
        """A tensor [N, D] of any float type and device to rows as stored, in C order."""
        import torch

        stored = rows.detach().to(device="cpu", dtype=getattr(torch, self.torch_name)).contiguous()
        if rows.dtype == torch.float16 != stored.dtype:
            # Which NaN comes of a NaN here depends on its place in the tensor.
            stored[stored.isnan()] = torch.nan
        return StoredRows({VALUES: self._carried(stored)})

    def _carried(self, values: torch.Tensor) -> Array:
        """A tensor of this type as NumPy holds it."""
        import torch

        array: Array = values.view(getattr(torch, self.bridge_dtype)).numpy().view(self.storage)
        return array


@dataclass(frozen=True)
class ScaledRowDtype(RowDtype):
    """A type of 8 bits: a row x is its scale s = max|x| / largest, and round(x / s).

    Everything is computed in float32 and number by number, so that no bit depends on threads, and
    decoded to float32. A row of zeros has the scale 0, one with an infinity or NaN the scale NaN;
    the numbers of both are zeros.
    """

    largest: float
    """The largest magnitude that is stored."""

    @property
    def decodes(self) -> bool:
        """They are scaled."""
        return True

    def parts(self, width: int) -> dict[str, RowComponent]:
        """The numbers, then the scale."""
        return super().parts(width) | {SCALES: RowComponent((), "<f4", "F32")}

    def to_float32(self, rows: StoredRows) -> NDArray[np.float32]:
        """The numbers that stored rows stand for, as `to_torch` has them. [N, D]"""
        values = rows.values if self.name == "int8" else _e4m3()[rows.values]
        with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale is any number
            return np.multiply(values, rows.scales[:, None], dtype=np.float32)

    def tensors(self, rows: StoredRows) -> dict[str, torch.Tensor]:
        """The numbers as int8, whatever they mean, and the scales."""
        import torch

        values = torch.from_numpy(rows.values.view(np.int8))
        return {VALUES: values, SCALES: torch.from_numpy(rows.scales)}

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The numbers that stored rows stand for. float32 [N, D], in memory of its own"""
        import torch

        values, scales = parts[VALUES], parts[SCALES][:, None]
        if self.name == "int8":
            return torch.mul(values, scales)
        # The bits of an e4m3, shifted, are those of a float16 with 1/256 of its value: sign in
        # place (extended to bit 15), four bits of exponent and three of mantissa below a zero.
        # So 4 Gvalues/s a core; torch's own conversion 0.3, a table of 256 entries 1.4.
        halves = values.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
        return torch.mul(halves.view(torch.float16), scales * 256)

    def from_torch(self, rows: torch.Tensor) -> StoredRows:
        """A tensor [N, D] of any float type to rows as stored; computed where it lies."""
        import torch

        rows = rows.detach()
        if rows.dtype == torch.float64:
            rows = rows.float()
        count, width = rows.shape
        step = max(1, _BLOCK // width) if rows.device.type == "cpu" else max(1, count)
        blocks = [slice(start, start + step) for start in range(0, count, step)]
        peaks = rows.new_empty(count)  # [N]
        for block in blocks:
            torch.amax(rows[block].abs(), dim=1, out=peaks[block])
        scales = peaks.float() / self.largest
        scales = torch.where(scales.isfinite(), scales, torch.nan)
        values = rows.new_empty((count, width), dtype=getattr(torch, self.torch_name))
        for block in blocks:
            quotients = torch.div(rows[block], scales[block, None])  # float32 [n, D]
            # A scale that is almost too small for float32 is itself rounded: quotients may pass
            # the largest.
            quotients.clamp_(-self.largest, self.largest)
            if self.name == "int8":
                # Half to even, as the conversion to e4m3 does: float32 has no more digits up there.
                # Not `round_`, which wakes all threads however little there is to do.
                quotients.add_(_WHOLE).sub_(_WHOLE)
            values[block] = quotients
        stored = StoredRows({VALUES: self._carried(values.cpu()), SCALES: scales.cpu().numpy()})
        stored.values[~(stored.scales > 0)] = 0  # not 0/0 or NaN made a number
        return stored


def check_overflow(
    activations: torch.Tensor, stored: StoredRows, row_dtype: RowDtype, hookpoint: str
) -> None:
    """Raise `ConfigError` if finite rows became infinite in float16, with their count.

    Args:
        activations: before rounding, of any type. [N, D]
        stored: after it.
        row_dtype: of `stored`.
        hookpoint: for the error.
    """
    if row_dtype.name != "float16" or str(activations.dtype) == "torch.float16":
        return
    overflowed = int((np.isinf(stored.values).any(axis=1)).sum())
    overflowed -= int(activations.isinf().any(dim=1).sum())
    _refuse_rows(overflowed, len(stored), hookpoint)


def check_infinite(stored: StoredRows, row_dtype: RowDtype, hookpoint: str) -> None:
    """The same for rows of which those that were captured infinite have been left out already."""
    if row_dtype.name == "float16":
        _refuse_rows(int(np.isinf(stored.values).any(axis=1).sum()), len(stored), hookpoint)


def _refuse_rows(overflowed: int, rows: int, hookpoint: str) -> None:
    if overflowed:
        raise ConfigError(
            f"activations of {hookpoint} do not fit float16",
            expected="absolute values below 65,520",
            got=f"{overflowed} rows of {rows} beyond",
            remedy="--dtype bfloat16 or float32, or leave such rows out with --max-norm-ratio",
        )


@functools.cache
def _e4m3() -> NDArray[np.float32]:
    """What the 256 codes stand for; the two for NaN, which are never stored, continue the line."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0)
    )
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


ROW_DTYPES: dict[str, RowDtype] = {
    row_dtype.name: row_dtype
    for row_dtype in (
        RowDtype("bfloat16", "<u2", "BF16", "bfloat16", "int16"),
        RowDtype("float16", "<f2", "F16", "float16", "float16"),
        RowDtype("float32", "<f4", "F32", "float32", "float32"),
        ScaledRowDtype("int8", "|i1", "I8", "int8", "int8", 127.0),
        ScaledRowDtype("float8_e4m3", "|u1", "F8_E4M3", "float8_e4m3fn", "uint8", 448.0),
    )
}
"""Every type that a cache may hold, by its name in the manifest."""
