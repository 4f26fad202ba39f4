from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from actcache.errors import CorruptShardError
from actcache.filesystem.atomic import digest_file
from actcache.format.manifest import Manifest, read_manifest
from actcache.storage import BACKENDS, ROW_DTYPES, TensorExtent, safetensors_io

BACKEND = BACKENDS["memmap"]


def manifest_of(make_cache: Callable[..., Path], width: int, dtype: str) -> Manifest:
    return read_manifest(
        make_cache(shards=0, hookpoints={"layers.0": width}, dtype=dtype, end=False)
    )


def test_a_shard_is_stored_in_the_folder_of_its_hookpoint(tmp_path: Path) -> None:
    path = BACKEND.path(tmp_path, "layers.9.mlp:in", 12)
    assert path == tmp_path / "activations" / "layers.9.mlp:in" / "00012.safetensors"


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_written_rows_are_located_and_opened_by_the_safetensors_library(
    dtype: str, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    row_dtype, manifest = ROW_DTYPES[dtype], manifest_of(make_cache, 3, dtype)
    stored = row_dtype.from_torch(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
    receipts = BACKEND.write(tmp_path, manifest, "layers.0", 1, stored)
    path = BACKEND.path(tmp_path, "layers.0", 1)
    assert receipts == {"activations/layers.0": digest_file(path)}
    assert BACKEND.files(tmp_path, manifest, 1) == {"activations/layers.0": path}
    tensors = safetensors.torch.load_file(path)
    assert list(tensors) == list(stored.parts)
    assert tensors["activations"].dtype == getattr(torch, row_dtype.torch_name)
    decoded = tensors["activations"].float()
    if dtype in ("int8", "float8_e4m3"):  # what any library does with the two tensors
        decoded = decoded * tensors["scales"][:, None]
    np.testing.assert_array_equal(decoded.numpy(), row_dtype.to_float32(stored))
    for part, array in stored.parts.items():
        extent = BACKEND.locate(tmp_path, manifest, "layers.0", 1, 5, part)
        assert isinstance(extent, TensorExtent)
        np.testing.assert_array_equal(safetensors_io.read([extent])[0], array)


def test_rows_of_another_shape_or_type_are_refused(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = manifest_of(make_cache, 6, "bfloat16")
    BACKEND.write(tmp_path, manifest, "layers.0", 0, ROW_DTYPES["bfloat16"].empty(4, 6))
    others = [(6, 4, "bfloat16"), (3, 6, "bfloat16"), (4, 6, "float16"), (4, 6, "int8")]
    for rows, width, dtype in others:
        other = manifest_of(make_cache, width, dtype)
        with pytest.raises(CorruptShardError):
            BACKEND.locate(tmp_path, other, "layers.0", 0, rows, "activations")
    BACKEND.locate(tmp_path, manifest, "layers.0", 0, 4, "activations")
