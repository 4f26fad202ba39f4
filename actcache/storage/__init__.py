"""Storage backends: how the rows of a shard are written to disk and located for reading."""

from __future__ import annotations

from actcache.format.dtypes import (
    ROW_DTYPES,
    Array,
    RowDtype,
    StoredRows,
    check_infinite,
    check_overflow,
)
from actcache.storage.blosc import CompressedExtent
from actcache.storage.safetensors_io import MemmapBackend, TensorExtent
from actcache.storage.zarr import ZarrBackend

__all__ = [
    "BACKENDS",
    "ROW_DTYPES",
    "Array",
    "CompressedExtent",
    "RowDtype",
    "StoredRows",
    "TensorExtent",
    "check_infinite",
    "check_overflow",
]


BACKENDS: dict[str, MemmapBackend | ZarrBackend] = {
    "memmap": MemmapBackend(),
    "zarr": ZarrBackend(),
}
"""All backends, by their name in the manifest; they write rows and locate their bytes."""
