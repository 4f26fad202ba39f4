"""Types of stored rows: NumPy, safetensors and torch types, quantisation to 8 bits, and decoding.

A stored row has one component, its values, or two: an 8-bit row has a scale as well. `StoredRows`
holds the components of some rows and `RowDtype.parts` describes them; backends, reader and stream
move all components alike. Little-endian throughout; bfloat16 is uint16 in NumPy.

Letters: N rows, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError

if TYPE_CHECKING:
    import torch


Array = NDArray[Any]

VALUES = "activations"
"""Component that every row has: its values. Also the name of its files and tensors."""
SCALES = "scales"
"""Factor of the values of an 8-bit row: one float32 for each row."""

_BLOCK = (1 << 15) - 1
"""Values encoded at once: below the size at which torch uses several threads, whose
synchronisation under load takes up to twenty times longer than one thread needs for all."""

_WHOLE = 1.5 * 2**23  # float32 numbers of this magnitude have no fraction bits


@dataclass(frozen=True)
class RowComponent:
    """Shape and type of one component of a row."""

    shape: tuple[int, ...]
    """Shape for one row: (width,), or () for a scale."""
    storage: str
    """NumPy type of the bytes."""
    tag: str
    """Type in a safetensors header."""

    @property
    def bytes(self) -> int:
        """Bytes of the component for one row."""
        return math.prod(self.shape) * np.dtype(self.storage).itemsize


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows in their on-disk representation. Indexing selects rows in all components."""

    parts: Mapping[str, Array]
    """Components by name, in the order of the bytes. Each [N, ...]"""

    @property
    def values(self) -> Array:
        """Stored values. [N, D]"""
        return self.parts[VALUES]

    @property
    def scales(self) -> NDArray[np.float32]:
        """Scales of 8-bit rows. [N]"""
        return self.parts[SCALES]

    @property
    def nbytes(self) -> int:
        """Bytes of all components."""
        return sum(part.nbytes for part in self.parts.values())

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Array) -> StoredRows:
        return StoredRows({name: part[rows] for name, part in self.parts.items()})

    def __setitem__(self, rows: slice | Array, other: StoredRows) -> None:
        for name, part in self.parts.items():
            part[rows] = other.parts[name]

    def take(self, rows: NDArray[np.int64], out: StoredRows) -> None:
        """Copy the rows at valid indices `rows` to `out`."""
        for name, part in self.parts.items():
            # mode='clip' makes NumPy write to `out` without an intermediate copy.
            np.take(part, rows, axis=0, out=out.parts[name], mode="clip")


@dataclass(frozen=True)
class RowDtype:
    """One type of activations, with its names in NumPy, safetensors and torch."""

    name: str
    """Name in the manifest."""
    storage: str
    """NumPy type of the bytes."""
    tag: str
    """Type in a safetensors header."""
    torch_name: str
    """Torch type of the values."""
    bridge_dtype: str
    """Type of this name in both NumPy and torch that carries the bits between them."""

    @property
    def decodes(self) -> bool:
        """True if `to_torch` computes float32 values in new memory instead of viewing the bytes."""
        return False

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return np.dtype(self.storage).itemsize

    def parts(self, width: int) -> dict[str, RowComponent]:
        """Describe the components of a row of `width` values, in the order of the bytes."""
        return {VALUES: RowComponent((width,), self.storage, self.tag)}

    def row_bytes(self, width: int) -> int:
        """Return the bytes of one row, all components together."""
        return sum(part.bytes for part in self.parts(width).values())

    def empty(self, rows: int, width: int) -> StoredRows:
        """Allocate uninitialised memory for rows."""
        return StoredRows(
            {
                name: np.empty((rows, *part.shape), dtype=part.storage)
                for name, part in self.parts(width).items()
            }
        )

    def to_float32(self, rows: StoredRows) -> NDArray[np.float32]:
        """Decode stored rows to float32 [N, D], exactly."""
        if self.name == "bfloat16":  # the upper half of a float32
            return (rows.values.astype(np.uint32) << 16).view(np.float32)
        return rows.values.astype(np.float32)

    def tensors(self, rows: StoredRows) -> dict[str, torch.Tensor]:
        """View the components of stored rows as tensors, the input of `decode`."""
        import torch

        return {
            name: torch.from_numpy(part.view(self.bridge_dtype) if name == VALUES else part)
            for name, part in rows.parts.items()
        }

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """View the result of `tensors`, or its copy on a device, as this type. [N, D]"""
        import torch

        return parts[VALUES].view(getattr(torch, self.torch_name))

    def to_torch(self, rows: StoredRows) -> torch.Tensor:
        """Return stored rows as a tensor that shares their memory (8-bit types: decoded)."""
        return self.decode(self.tensors(rows))

    def from_torch(self, rows: torch.Tensor) -> StoredRows:
        """Encode a tensor [N, D] of any float type and device as stored rows, in C order."""
        import torch

        stored = rows.detach().to(device="cpu", dtype=getattr(torch, self.torch_name)).contiguous()
        if rows.dtype == torch.float16 != stored.dtype:
            # The payload of a converted NaN depends on its index in the tensor: use one NaN.
            stored[stored.isnan()] = torch.nan
        return StoredRows({VALUES: self._carried(stored)})

    def _carried(self, values: torch.Tensor) -> Array:
        """View the bits of a tensor of this type as a NumPy array of the storage type."""
        import torch

        array: Array = values.view(getattr(torch, self.bridge_dtype)).numpy().view(self.storage)
        return array


@dataclass(frozen=True)
class ScaledRowDtype(RowDtype):
    """An 8-bit type: a row x is stored as its scale s = max|x| / largest and round(x / s).

    All arithmetic is elementwise float32, so that no bit depends on threads; rows decode to
    float32. A row of zeros has the scale 0, a row with an infinity or NaN the scale NaN; the values
    of both are zeros.
    """

    largest: float
    """Largest stored magnitude."""

    @property
    def decodes(self) -> bool:
        """True: values are multiplied by their scales."""
        return True

    def parts(self, width: int) -> dict[str, RowComponent]:
        """Describe the two components: the values, then the scale."""
        return super().parts(width) | {SCALES: RowComponent((), "<f4", "F32")}

    def to_float32(self, rows: StoredRows) -> NDArray[np.float32]:
        """Decode stored rows to float32, bit for bit as `to_torch` does. [N, D]"""
        values = rows.values if self.name == "int8" else _e4m3()[rows.values]
        with np.errstate(over="ignore", invalid="ignore"):  # a hostile file holds any scale
            return np.multiply(values, rows.scales[:, None], dtype=np.float32)

    def tensors(self, rows: StoredRows) -> dict[str, torch.Tensor]:
        """View the values as int8, and the scales."""
        import torch

        values = torch.from_numpy(rows.values.view(np.int8))
        return {VALUES: values, SCALES: torch.from_numpy(rows.scales)}

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Multiply values by scales: float32 [N, D] in new memory."""
        import torch

        values, scales = parts[VALUES], parts[SCALES][:, None]
        if self.name == "int8":
            return torch.mul(values, scales)
        # The bits of an e4m3, shifted left by 7, are those of a float16 of 1/256 of its value:
        # sign (extended to bit 15), a zero bit, four exponent bits, three mantissa bits.
        # 4 Gvalues/s per core; torch's own conversion reaches 0.3, a table of 256 entries 1.4.
        halves = values.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
        return torch.mul(halves.view(torch.float16), scales * 256)

    def from_torch(self, rows: torch.Tensor) -> StoredRows:
        """Encode a tensor [N, D] of any float type as stored rows, on the tensor's device."""
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
            # A subnormal scale is itself rounded, so quotients may exceed `largest`.
            quotients.clamp_(-self.largest, self.largest)
            if self.name == "int8":
                # Round half to even, as the conversion to e4m3 does, by adding and subtracting.
                # `round_` would use all threads however small the tensor.
                quotients.add_(_WHOLE).sub_(_WHOLE)
            values[block] = quotients
        stored = StoredRows({VALUES: self._carried(values.cpu()), SCALES: scales.cpu().numpy()})
        stored.values[~(stored.scales > 0)] = 0  # 0/0 and NaN converted to some integer
        return stored


class RowBuffers:
    """Reused buffers for rows, since allocating fresh pages costs as much as filling them."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, StoredRows] = {}

    def rows(self, owner: Hashable, count: int, width: int, row_dtype: RowDtype) -> StoredRows:
        """Return a buffer for `count` rows, overwriting the owner's previous one.

        Args:
            owner: key of the buffer, always used with one width and type.
            count: number of rows.
            width: numbers of a row.
            row_dtype: type of the rows.
        """
        found = self._rows.get(owner)
        if found is None or len(found) < count:
            found = self._rows[owner] = row_dtype.empty(count, width)
        return found[:count]


def check_overflow(
    activations: torch.Tensor, stored: StoredRows, row_dtype: RowDtype, hookpoint: str
) -> None:
    """Raise `ConfigError` if finite rows became infinite by rounding to float16.

    Args:
        activations: rows before rounding, of any type. [N, D]
        stored: the same rows after rounding.
        row_dtype: type of `stored`.
        hookpoint: name for the error.
    """
    if row_dtype.name != "float16" or str(activations.dtype) == "torch.float16":
        return
    overflowed = int((np.isinf(stored.values).any(axis=1)).sum())
    overflowed -= int(activations.isinf().any(dim=1).sum())
    _refuse_rows(overflowed, len(stored), hookpoint)


def check_infinite(stored: StoredRows, row_dtype: RowDtype, hookpoint: str) -> None:
    """Raise `ConfigError` if float16 rows are infinite, when captured infinities are dropped."""
    if row_dtype.name == "float16":
        _refuse_rows(int(np.isinf(stored.values).any(axis=1).sum()), len(stored), hookpoint)


def _refuse_rows(overflowed: int, rows: int, hookpoint: str) -> None:
    if overflowed:
        raise ConfigError(
            f"activations of {hookpoint} do not fit float16",
            expected="absolute values below 65,520",
            got=f"{overflowed} rows of {rows} beyond",
            remedy="--dtype bfloat16 or float32, or drop such rows with --max-norm-ratio",
        )


@functools.cache
def _e4m3() -> NDArray[np.float32]:
    """Return the values of the 256 codes; the two NaN codes, never stored, get finite values."""
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
"""All types of stored rows, by their name in the manifest."""
