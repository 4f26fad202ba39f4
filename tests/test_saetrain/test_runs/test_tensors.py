"""safetensors files are read once, and checked before torch loads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from actcache.errors import FormatError
from actcache.filesystem.rooted import rooted
from saetrain.runs.tensors import load_tensors, read_tensors_file

TENSORS = {"a": torch.ones(2, 3), "b": torch.arange(4)}
PATH = Path("x.safetensors")


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(**changes: Any) -> bytes:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return with_header(json.dumps({"a": one}).encode(), b"\0" * 8)


def test_a_file_is_read_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / PATH).write_bytes(save(TENSORS, {"made": "here"}))
    loaded = load_tensors(PATH, read_tensors_file(tmp_path / PATH))
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1",
        b"\xff" * 8 + b"{}",
        with_header(b"[]"),
        with_header(b"{"),
        with_header(b'{"a": 1}'),
        with_header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        with_header(b'{"a":' + b"9" * 10_000 + b"}"),
        with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', b"\0" * 4),
        entry(shape=[2**64 - 1, 0], data_offsets=[0, 0]),
        entry(shape=[2**62, 0], data_offsets=[0, 0]),
        entry(shape=[2**30, 2**30, 0], data_offsets=[0, 0]),
        entry(shape=[-2]),
        entry(shape=[2.0]),
        entry(shape=[True, 2]),
        entry(shape=None),
        entry(shape=[3]),
        entry(data_offsets=[0, 2**64 - 1]),
        entry(data_offsets=[8, 0]),
        entry(data_offsets=None),
        entry(dtype="F8_E4M3", shape=[8]),
        entry(dtype="F4", shape=[16]),
        entry(dtype="C64", shape=[1]),
        entry(dtype=["F32"]),
        save(TENSORS)[:-1],
        save(TENSORS) + b"\0",
    ],
    ids=lambda data: repr(data[8:60]),
)
def test_a_header_that_cannot_be_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match=str(PATH)):
        load_tensors(PATH, data)


def test_pipes_and_folders_are_refused_and_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("pipe", ".", "circle", "none"):
        with pytest.raises(FormatError, match=str(tmp_path)):
            read_tensors_file(tmp_path / name)


def test_links_are_followed_to_an_sae_of_the_user_and_not_within_a_run(tmp_path: Path) -> None:
    (tmp_path / PATH).write_bytes(save(TENSORS))
    (tmp_path / "link").symlink_to(PATH)
    assert read_tensors_file(tmp_path / "link") == save(TENSORS)  # as in the cache of the Hub
    with pytest.raises(FormatError, match="link is a symbolic link"):
        read_tensors_file(rooted(tmp_path) / "link")
