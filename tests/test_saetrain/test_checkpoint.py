"""`saetrain.checkpoint`: whole or not there, and never damaged unnoticed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from actcache.errors import DiskFullError, FormatError
from saetrain.checkpoint import FOLDER, STATE, load_checkpoint, save_checkpoint

STREAM = {"epoch": 1, "step": 2}


def contents(step: int) -> list[tuple[dict[str, torch.Tensor], dict[str, float]]]:
    generator = torch.Generator().manual_seed(step)
    return [
        (
            {
                "sae.W": torch.randn(4, 3, generator=generator).T,  # not contiguous
                "firing": torch.tensor([step, 2**40]),
                "meter": torch.tensor([0.1, float(step)], dtype=torch.float64),
            },
            {"optimizer.weight_sum": 0.1 * step, "meter.steps": 3},
        ),
        ({"sae.W": torch.zeros(2, dtype=torch.bfloat16)}, {}),
    ]


def folder(root: Path, step: int) -> Path:
    return root / FOLDER / f"{step:09d}"


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 7, STREAM, contents(7))
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    state, tensors = loaded
    assert (state.step, state.stream) == (7, STREAM)
    for (expected, numbers), got, sae in zip(contents(7), tensors, state.saes, strict=True):
        assert sae.numbers == numbers
        assert got.keys() == expected.keys()
        for name in expected:
            assert got[name].dtype == expected[name].dtype
            assert torch.equal(got[name], expected[name])


def test_a_run_without_a_checkpoint_has_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    (tmp_path / FOLDER).mkdir()
    assert load_checkpoint(tmp_path) is None


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 7, STREAM, contents(7))
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"00000.safetensors", "00001.safetensors", STATE}


def test_the_older_checkpoints_go_once_a_newer_one_is_whole(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, STREAM, contents(step))
        assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [f"{step:09d}"]


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 9, STREAM, contents(9))
    older = shutil.copytree(folder(tmp_path, 9), tmp_path / "copy")
    save_checkpoint(tmp_path, 10, STREAM, contents(10))
    older.rename(folder(tmp_path, 9))  # as after a kill before the older one was removed
    begun = shutil.copytree(folder(tmp_path, 10), folder(tmp_path, 11))
    (begun / STATE).unlink()  # as after a kill before the newer one was whole
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0].step == 10


@pytest.mark.parametrize("damage", ["flip", "cut", "lengthen", "remove"])
def test_a_damaged_file_of_a_checkpoint_is_refused_by_its_name(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, 9, STREAM, contents(9))
    path = folder(tmp_path, 9) / "00000.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    path.write_bytes(data[:-1] if damage == "cut" else data + b"\0" * (damage == "lengthen"))
    if damage == "remove":
        path.unlink()
    with pytest.raises(FormatError, match=r"00000\.safetensors is not what its checkpoint wrote"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step": 1, "stream": {}, "saes": [0]}'])
def test_a_damaged_state_is_refused(tmp_path: Path, text: str) -> None:
    save_checkpoint(tmp_path, 9, STREAM, contents(9))
    (folder(tmp_path, 9) / STATE).write_text(text)
    with pytest.raises(FormatError, match=r"state\.json"):
        load_checkpoint(tmp_path)


def test_on_a_full_disk_the_checkpoint_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 9, STREAM, contents(9))

    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(DiskFullError):
            save_checkpoint(tmp_path, 10, STREAM, contents(10))
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0].step == 9


def test_a_state_names_every_file_with_its_digest(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 9, STREAM, contents(9))
    state = json.loads((folder(tmp_path, 9) / STATE).read_text())
    sizes = [path.stat().st_size for path in sorted(folder(tmp_path, 9).glob("*.safetensors"))]
    assert [sae["file"]["bytes"] for sae in state["saes"]] == sizes
    assert all(len(sae["file"]["xxh3_128"]) == 32 for sae in state["saes"])
