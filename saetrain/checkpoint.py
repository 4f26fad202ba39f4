"""A run's state on disk, from which it goes on as if it had never stopped.

`RUN/checkpoints/STEP/`: one safetensors file per SAE, and last `state.json`, which holds the
counters and every file's digest. A folder without a valid state.json is not a checkpoint. Older
checkpoints go once a newer one is whole. Nothing is pickled.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from actcache.atomic import FileReceipt, digest_file, publish
from actcache.errors import FormatError
from actcache.parse import parse_dataclass, read_json, to_json

FOLDER = "checkpoints"
STATE = "state.json"


@dataclass(frozen=True)
class SaeState:
    """One SAE's part: its file, and what is not a tensor."""

    file: FileReceipt
    numbers: dict[str, float]


@dataclass(frozen=True)
class State:
    """Contents of state.json."""

    step: int
    """Steps done."""
    stream: dict[str, int]
    """Where the next batch lies."""
    saes: tuple[SaeState, ...]


def save_checkpoint(
    root: Path,
    step: int,
    stream: dict[str, int],
    saes: list[tuple[dict[str, Tensor], dict[str, float]]],
) -> None:
    """Write a checkpoint, then remove the older ones.

    Args:
        root: folder of the run.
        step: steps done.
        stream: the stream's state.
        saes: tensors and numbers of each SAE, in the run's order.

    Raises:
        DiskFullError: no room; the checkpoint before stays.
    """
    folder = root / FOLDER / f"{step:09d}"
    parts = []
    for i, (tensors, numbers) in enumerate(saes):
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        parts.append(SaeState(publish(folder / f"{i:05d}.safetensors", [save(plain)]), numbers))
    publish(folder / STATE, [to_json(State(step, stream, tuple(parts)))])
    remove_others(root, step)


def remove_others(root: Path, step: int) -> None:
    """Remove all checkpoints but that of `step`, and what a kill left of any."""
    for other in (root / FOLDER).iterdir():
        if other.name != f"{step:09d}" and other.is_dir():
            shutil.rmtree(other)


def load_checkpoint(root: Path) -> tuple[State, list[dict[str, Tensor]]] | None:
    """The newest checkpoint: its state and each SAE's tensors; None if there is none yet.

    Raises:
        FormatError: it is damaged.
    """
    folders = sorted(p.parent for p in (root / FOLDER).glob(f"*/{STATE}"))
    if not folders:
        return None
    folder = folders[-1]
    state = parse_dataclass(State, read_json(folder / STATE), str(folder / STATE))
    tensors = []
    for i, part in enumerate(state.saes):
        path = folder / f"{i:05d}.safetensors"
        got = digest_file(path) if path.is_file() else "nothing"
        if got != part.file:
            raise FormatError(
                f"{path} is not what its checkpoint wrote",
                expected=part.file,
                got=got,
                remedy=f"remove {folder} to go on from an older checkpoint, if there is one, or "
                "begin the run anew",
            )
        tensors.append(load(path.read_bytes()))
    return state, tensors
