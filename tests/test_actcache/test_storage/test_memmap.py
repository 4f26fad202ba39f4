from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from actcache.atomic import digest_file
from actcache.errors import CorruptShardError
from actcache.manifest import Manifest, read_manifest
from actcache.storage import BACKENDS, CODECS, Extent, safetensors_file

BACKEND = BACKENDS["memmap"]


def manifest_of(make_cache: Callable[..., Path], width: int, dtype: str) -> Manifest:
    return read_manifest(
        make_cache(shards=0, hookpoints={"layers.0": width}, dtype=dtype, end=False)
    )


def test_a_shard_lies_in_a_folder_of_its_hookpoint(tmp_path: Path) -> None:
    path = BACKEND.path(tmp_path, "layers.9.mlp:in", 12)
    assert path == tmp_path / "activations" / "layers.9.mlp:in" / "00012.safetensors"


@pytest.mark.parametrize("dtype", CODECS)
def test_rows_written_are_found_and_opened_by_the_safetensors_library(
    dtype: str, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    codec, manifest = CODECS[dtype], manifest_of(make_cache, 3, dtype)
    tensor = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    tensor = tensor.to(getattr(torch, dtype))
    receipt = BACKEND.write(tmp_path, manifest, "layers.0", 1, codec.from_torch(tensor))
    path = BACKEND.path(tmp_path, "layers.0", 1)
    assert receipt == digest_file(path)
    assert torch.equal(safetensors.torch.load_file(path)["activations"], tensor)
    extent = BACKEND.locate(tmp_path, manifest, "layers.0", 1, 5)
    assert isinstance(extent, Extent)
    np.testing.assert_array_equal(safetensors_file.read(extent), codec.from_torch(tensor))


def test_rows_of_another_shape_or_type_are_refused(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = manifest_of(make_cache, 6, "bfloat16")
    BACKEND.write(tmp_path, manifest, "layers.0", 0, np.zeros((4, 6), dtype="<u2"))
    for rows, width, dtype in [(6, 4, "bfloat16"), (3, 6, "bfloat16"), (4, 6, "float16")]:
        with pytest.raises(CorruptShardError):
            BACKEND.locate(tmp_path, manifest_of(make_cache, width, dtype), "layers.0", 0, rows)
    BACKEND.locate(tmp_path, manifest, "layers.0", 0, 4)
