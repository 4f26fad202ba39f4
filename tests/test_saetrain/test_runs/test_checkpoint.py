"""Checkpoints are complete or absent, and damage is detected."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import saetrain.runs.checkpoint
from actcache.errors import DiskFullError, FormatError
from actcache.filesystem.atomic import FileDigest
from saetrain.runs.checkpoint import (
    Best,
    RetentionPolicy,
    best_steps,
    finalize_checkpoint,
    load_checkpoint,
    newest_state,
    newest_step,
    remove_other_bests,
    save_sae_state,
    state_path,
    tensors_path,
)

STREAM = {"epoch": 1, "step": 2}
EXPORTS = [FileDigest(1, "a" * 32), FileDigest(2, "b" * 32)]


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


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


def names(step: int) -> set[str]:
    return {f"checkpoint-{step:09d}.{end}" for end in ("json", *ENDS)}


def save_checkpoint(
    root: Path,
    step: int,
    bests: list[Best | None] | None = None,
    keep: RetentionPolicy = RetentionPolicy(),  # noqa: B008 # frozen
) -> None:
    parts = [
        save_sae_state(root, step, i, state, export, best)
        for i, (state, export, best) in enumerate(
            zip(contents(step), EXPORTS, bests or [None, None], strict=True)
        )
    ]
    finalize_checkpoint(root, step, STREAM, parts, keep)


ENDS = ("00000.safetensors", "00001.safetensors")


def test_a_checkpoint_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 7)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    state, tensors = loaded
    assert (state.step, state.stream) == (7, STREAM)
    assert [sae.export for sae in state.saes] == EXPORTS
    for (expected, numbers), got, sae in zip(contents(7), tensors, state.saes, strict=True):
        assert sae.numbers == numbers
        assert got.keys() == expected.keys()
        for name in expected:
            assert got[name].dtype == expected[name].dtype
            assert torch.equal(got[name], expected[name])


def test_a_folder_without_a_complete_checkpoint_loads_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-000000007.00000.safetensors").write_text("")
    assert load_checkpoint(tmp_path) is None


def test_a_checkpoint_is_plain_files_and_nothing_is_pickled(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 7)
    assert files(tmp_path).keys() == names(7)


def test_older_checkpoints_are_removed_once_a_newer_one_is_complete(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-mine.json").write_text("{}")
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step)
        assert files(tmp_path).keys() == names(step) | {"checkpoint-mine.json"}


def test_the_newest_complete_checkpoint_is_loaded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 9)
    older = files(tmp_path)
    save_checkpoint(tmp_path, 10)
    for name, data in older.items():  # a kill before the older one was removed
        (tmp_path / name).write_bytes(data)
    tensors_path(tmp_path, 11, 0).write_bytes(b"")  # a kill before a newer one was complete
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0].step == 10


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-0000000000010.json",
        "checkpoint-0000000010.json",
        "checkpoint-10.json",
        "checkpoint-0000000000010.00000.safetensors",
    ],
)
def test_a_name_that_no_run_writes_is_left_alone(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, 9)
    (tmp_path / name).write_text("mine")
    assert newest_step(tmp_path) == 9
    save_checkpoint(tmp_path, 11)
    (tmp_path / "checkpoint-000000012.json").mkdir()
    assert newest_step(tmp_path) == 11
    assert (tmp_path / name).read_text() == "mine"


def test_steps_of_ten_digits_are_names_of_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2**40)
    assert newest_step(tmp_path) == 2**40


def test_folders_of_best_saes_of_other_names_are_left_alone(tmp_path: Path) -> None:
    for name in ("best-000000003", "best-0000000003", "best-3"):
        (tmp_path / name).mkdir()
    remove_other_bests(tmp_path, set())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-0000000003", "best-3"]


@pytest.mark.parametrize("damage", ["flip", "cut", "lengthen", "remove"])
def test_a_damaged_file_raises_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, 9)
    path = tensors_path(tmp_path, 9, 0)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    path.write_bytes(data[:-1] if damage == "cut" else data + b"\0" * (damage == "lengthen"))
    if damage == "remove":
        path.unlink()
    with pytest.raises(FormatError, match=r"00000\.safetensors is not what its checkpoint wrote"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step": 1, "stream": {}, "saes": [0]}'])
def test_a_damaged_state_file_raises_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    save_checkpoint(tmp_path, 9)
    state_path(tmp_path, 9).write_text(text)
    with pytest.raises(FormatError, match=r"checkpoint-000000009\.json"):
        load_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 9)

    def disk_is_full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", disk_is_full)
        with pytest.raises(DiskFullError):
            save_checkpoint(tmp_path, 10)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0].step == 9


def test_the_state_file_holds_the_digest_of_every_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 9)
    state = json.loads(state_path(tmp_path, 9).read_text())
    sizes = [tensors_path(tmp_path, 9, i).stat().st_size for i in range(2)]
    assert [sae["file"]["bytes"] for sae in state["saes"]] == sizes
    assert all(len(sae["file"]["xxh3_128"]) == 32 for sae in state["saes"])


# --- retention ----------------------------------------------------------------------------------


def kept_steps(root: Path) -> list[int]:
    steps = sorted(int(path.name[11:20]) for path in root.glob("checkpoint-*.json"))
    assert files(root).keys() == set().union(*map(names, steps))
    return steps


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (RetentionPolicy(), [12]),
        (RetentionPolicy(3), [8, 10, 12]),
        (RetentionPolicy(99), [2, 4, 6, 8, 10, 12]),
        (RetentionPolicy(1, 6), [6, 12]),
        (RetentionPolicy(2, 4), [4, 8, 10, 12]),
    ],
    ids=str,
)
def test_the_policy_keeps_the_newest_checkpoints_and_multiples_of_a_step(
    tmp_path: Path, keep: RetentionPolicy, expected: list[int]
) -> None:
    for step in range(2, 13, 2):
        save_checkpoint(tmp_path, step, keep=keep)
    assert kept_steps(tmp_path) == expected


@pytest.mark.parametrize("last", [1, 2, 3, 9])
@pytest.mark.parametrize("every", [None, 6])
def test_the_checkpoints_kept_do_not_depend_on_interruptions(last: int, every: int | None) -> None:
    keep = RetentionPolicy(last, every, 4)
    due = [step for step in range(1, 31) if step % 4 == 0 or keep.is_due(step) or step == 30]

    def kept(stops: set[int]) -> list[set[int]]:
        """Return what is kept at each scheduled step of a run that was stopped at some steps."""
        on_disk: set[int] = set()
        found = []
        for step in sorted({*due, *stops}):
            on_disk = keep.choose(on_disk | {step})
            assert step in on_disk
            assert len(on_disk) >= min(last, 1 + sum(s < step for s in due))
            if step in due:
                found.append(on_disk)
        return found

    for stops in ({7}, {7, 9, 10, 11}, {1, 2, 3}, {29}, set(range(1, 31))):
        assert kept(stops) == kept(set())


def test_best_steps_are_those_named_by_any_undamaged_checkpoint(tmp_path: Path) -> None:
    for step, best in ((3, 2), (6, 2), (9, 8), (12, 11)):
        bests = [Best(best, 0.5, EXPORTS[0]), None]
        save_checkpoint(tmp_path, step, bests, RetentionPolicy(3))
    assert kept_steps(tmp_path) == [6, 9, 12]
    assert best_steps(tmp_path, 0) == {2, 8, 11}
    assert best_steps(tmp_path, 1) == best_steps(tmp_path, 2) == set()
    state_path(tmp_path, 9).write_text("{")
    assert best_steps(tmp_path, 0) == {2, 11}


# --- damage and fallback -------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_newest_undamaged_checkpoint_is_loaded_and_the_error_reported(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        save_checkpoint(tmp_path, step, keep=RetentionPolicy(4))
    warned: list[tuple[str, int]] = []

    def load() -> int:
        warned.clear()
        loaded = load_checkpoint(tmp_path, fell_back=lambda e, step: warned.append((e.what, step)))
        assert loaded is not None
        assert torch.equal(loaded[1][0]["firing"], contents(loaded[0].step)[0][0]["firing"])
        return loaded[0].step

    assert (load(), warned) == (12, [])
    flip(tensors_path(tmp_path, 12, 1))
    assert load() == 9
    state_path(tmp_path, 9).write_text("")
    assert load() == 6
    tensors_path(tmp_path, 6, 0).unlink()
    assert load() == 3
    names = tensors_path(tmp_path, 12, 1), state_path(tmp_path, 9), tensors_path(tmp_path, 6, 0)
    assert [step for _, step in warned] == [3, 3, 3]
    for name, (what, _) in zip(names, warned, strict=True):
        assert str(name) in what
    flip(state_path(tmp_path, 3))
    with pytest.raises(FormatError, match=r"000012\.00001(.|\n)*no other checkpoint is whole"):
        load()


def test_a_file_that_no_library_can_load_is_skipped_like_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = RetentionPolicy(last=2)
    save_checkpoint(tmp_path, 9, keep=keep)
    shape, dtype = [2**64 - 1, 0], "F32"
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}).encode()
    data = len(header).to_bytes(8, "little") + header
    monkeypatch.setattr(saetrain.runs.checkpoint, "save", lambda _: data)
    save_checkpoint(tmp_path, 10, keep=keep)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0].step == 9


def test_a_checkpoint_whose_files_fail_the_check_is_skipped(tmp_path: Path) -> None:
    for step in (3, 6):
        save_checkpoint(tmp_path, step, keep=RetentionPolicy(2))

    def check(state: Any) -> None:
        if state.step == 6:
            raise FormatError("its best SAE is missing")

    loaded = load_checkpoint(tmp_path, check=check)
    assert loaded is not None
    assert loaded[0].step == 3


def test_the_seal_covers_every_value_of_the_state(tmp_path: Path) -> None:
    """A changed number is still valid JSON."""
    save_checkpoint(tmp_path, 9)
    path = state_path(tmp_path, 9)
    whole = json.loads(path.read_text())
    for change in (
        {"stream": STREAM | {"step": 3}},
        {"saes": [whole["saes"][0] | {"numbers": {"meter.steps": 4}}, whole["saes"][1]]},
        {"saes": whole["saes"][::-1]},
        {"seal": "0" * 32},
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(FormatError, match="is damaged"):
            newest_state(tmp_path)
    path.write_text(json.dumps(whole | {"seal": None}))  # as written by earlier versions
    assert newest_state(tmp_path) is not None
