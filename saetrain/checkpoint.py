"""A run's state on disk, from which it goes on as if it had never stopped.

One safetensors file per SAE, `RUN/checkpoint-STEP.NUMBER.safetensors`, and last
`RUN/checkpoint-STEP.json`, which holds the counters and every file's digest: without it, there is
no checkpoint. Older checkpoints go once a newer one is whole. Nothing is pickled.

They lie flat: sparsify takes every folder within a run for an SAE.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from actcache.atomic import FileReceipt, digest_file, publish
from actcache.errors import FormatError
from actcache.parse import parse_dataclass, read_json, to_json
from saetrain.best import Best

_FILE = re.compile(r"checkpoint-([0-9]{9,})\.(json|[0-9]{5}\.safetensors)")


@dataclass(frozen=True)
class SaeState:
    """One SAE's part: its file, what is not a tensor, and the weights' file for others."""

    file: FileReceipt
    numbers: dict[str, float]
    export: FileReceipt
    best: Best | None = None
    """With --save-best, the best that it has been."""


@dataclass(frozen=True)
class State:
    """Contents of the .json file."""

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
    exports: list[FileReceipt],
    bests: list[Best | None] | None = None,
) -> None:
    """Write a checkpoint, then remove the older ones.

    Args:
        root: folder of the run.
        step: steps done.
        stream: the stream's state.
        saes: tensors and numbers of each SAE, in the run's order.
        exports: of each SAE, the file of weights that others load, written before.
        bests: of each SAE, the best that it has been, written before; None: none are kept.

    Raises:
        DiskFullError: no room; the checkpoint before stays.
    """
    parts = []
    for i, (tensors, numbers) in enumerate(saes):
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        file = publish(tensors_path(root, step, i), [save(plain)])
        parts.append(SaeState(file, numbers, exports[i], None if bests is None else bests[i]))
    publish(state_path(root, step), [to_json(State(step, stream, tuple(parts)))])
    remove_others(root, step)


def remove_others(root: Path, step: int) -> None:
    """Remove all checkpoints but that of `step`, and what a kill left of any."""
    others = sorted(path for path, of in _files(root) if of != step)
    for other in sorted(others, key=lambda path: path.suffix != ".json"):  # the states first
        other.unlink()


def newest_step(root: Path) -> int | None:
    """Steps done at the newest checkpoint, or None if there is none yet."""
    return max((step for path, step in _files(root) if path.suffix == ".json"), default=None)


def newest_state(root: Path) -> State | None:
    """The state of the newest checkpoint, if there is one; raises `FormatError`."""
    step = newest_step(root)
    if step is None:
        return None
    path = state_path(root, step)
    state = parse_dataclass(State, read_json(path), str(path))
    if state.step != step:
        raise FormatError(f"{path} is not of its step", expected=step, got=state.step)
    return state


def state_path(root: Path, step: int) -> Path:
    """The file that makes a checkpoint whole."""
    return root / f"checkpoint-{step:09d}.json"


def tensors_path(root: Path, step: int, sae: int) -> Path:
    """The file of one SAE of a checkpoint."""
    return root / f"checkpoint-{step:09d}.{sae:05d}.safetensors"


def _files(root: Path) -> list[tuple[Path, int]]:
    """Every file of a checkpoint, whole or not, and its step."""
    matches = [(path, _FILE.fullmatch(path.name)) for path in root.iterdir()]
    return [(path, int(match[1])) for path, match in matches if match]


def load_checkpoint(root: Path) -> tuple[State, list[dict[str, Tensor]]] | None:
    """The newest checkpoint: its state and each SAE's tensors; None if there is none yet.

    Raises:
        FormatError: it is damaged.
    """
    state = newest_state(root)
    if state is None:
        return None
    tensors = []
    for i, part in enumerate(state.saes):
        path = tensors_path(root, state.step, i)
        got = digest_file(path) if path.is_file() else "nothing"
        if got != part.file:
            raise FormatError(
                f"{path} is not what its checkpoint wrote",
                expected=part.file,
                got=got,
                remedy=f"remove {state_path(root, state.step)} to go on from an older checkpoint, "
                "if there is one, or begin the run anew",
            )
        tensors.append(load(path.read_bytes()))
    return state, tensors
