"""A run's state on disk, from which it goes on as if it had never stopped.

One safetensors file per SAE, `RUN/checkpoint-STEP.NUMBER.safetensors`, and last
`RUN/checkpoint-STEP.json`, which holds the counters, every file's digest, and its own: without it,
there is no checkpoint. Older checkpoints go once a newer one is whole, but for those that are kept.
Nothing is pickled.

They lie flat: sparsify takes every folder within a run for an SAE.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from actcache.core.json_codec import parse_dataclass, read_json, to_json
from actcache.errors import FormatError
from actcache.filesystem.atomic import FileDigest, digest_file, write_atomic

_FILE = re.compile(r"checkpoint-([0-9]{9,})\.(json|[0-9]{5}\.safetensors)")


@dataclass(frozen=True)
class SaeState:
    """One SAE's part: its file, what is not a tensor, and the weights' file for others."""

    file: FileDigest
    numbers: dict[str, float]
    export: FileDigest
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
    seal: str | None = None
    """XXH3 128-bit digest of the file without it; null in one from before there was any."""


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints stay when there are newer ones."""

    last: int = 1
    """So many of the newest."""
    every: int | None = None
    """And those of every so many steps."""

    def choose(self, steps: Collection[int]) -> set[int]:
        """Those of the checkpoints of these steps that stay."""
        kept = set(sorted(steps)[-self.last :])
        return kept | {step for step in steps if self.is_due(step)}

    def is_due(self, step: int) -> bool:
        """Whether there must be a checkpoint of a step, for it to be kept."""
        return self.every is not None and step % self.every == 0


NEWEST = RetentionPolicy()
"""The newest one alone."""


def save_checkpoint(
    root: Path,
    step: int,
    stream: dict[str, int],
    saes: list[tuple[dict[str, Tensor], dict[str, float]]],
    exports: list[FileDigest],
    bests: list[Best | None] | None = None,
    keep: RetentionPolicy = NEWEST,
) -> None:
    """Write a checkpoint, then remove older ones.

    Args:
        root: folder of the run.
        step: steps done.
        stream: the stream's state.
        saes: tensors and numbers of each SAE, in the run's order.
        exports: of each SAE, the file of weights that others load, written before.
        bests: of each SAE, the best that it has been, written before; None: none are kept.
        keep: which older ones stay.

    Raises:
        DiskFullError: no room; the checkpoint before stays.
    """
    bests = [None] * len(saes) if bests is None else bests
    parts = [
        save_sae_state(root, step, i, state, export, best)
        for i, (state, export, best) in enumerate(zip(saes, exports, bests, strict=True))
    ]
    finalize_checkpoint(root, step, stream, parts, keep)


def save_sae_state(
    root: Path,
    step: int,
    sae: int,
    state: tuple[dict[str, Tensor], dict[str, float]],
    export: FileDigest,
    best: Best | None = None,
) -> SaeState:
    """Write what a checkpoint has of one SAE; it counts once `finalize_checkpoint` is told."""
    tensors, numbers = state
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return SaeState(
        write_atomic(tensors_path(root, step, sae), [save(plain)]), numbers, export, best
    )


def finalize_checkpoint(
    root: Path,
    step: int,
    stream: dict[str, int],
    parts: Sequence[SaeState],
    keep: RetentionPolicy = NEWEST,
) -> None:
    """Make a checkpoint of the parts of all SAEs, then remove older ones."""
    state = State(step, stream, tuple(parts))
    write_atomic(state_path(root, step), [to_json(dataclasses.replace(state, seal=_seal(state)))])
    remove_others(root, step, keep)


def remove_others(root: Path, step: int, keep: RetentionPolicy = NEWEST) -> None:
    """Remove all checkpoints but that of `step` and older ones to keep; what a kill left, too."""
    found = _files(root)
    kept = keep.choose({of for path, of in found if path.suffix == ".json" and of <= step})
    others = sorted(path for path, of in found if of not in kept)
    for other in sorted(others, key=lambda path: path.suffix != ".json"):  # the states first
        other.unlink()


def newest_step(root: Path) -> int | None:
    """Steps done at the newest checkpoint, or None if there is none yet."""
    return max((step for path, step in _files(root) if path.suffix == ".json"), default=None)


def newest_state(root: Path) -> State | None:
    """The state of the newest checkpoint, if there is one; raises `FormatError`."""
    step = newest_step(root)
    return None if step is None else read_state(root, step)


def read_state(root: Path, step: int) -> State:
    """The state of the checkpoint of a step; raises `FormatError` if it is damaged."""
    path = state_path(root, step)
    obj = read_json(path)
    state = parse_dataclass(State, obj, str(path))
    if state.seal is not None and state.seal != _seal(obj):
        raise FormatError(f"{path} is damaged", expected=f"digest {state.seal}", got=_seal(obj))
    if state.step != step:
        raise FormatError(f"{path} is not of its step", expected=step, got=state.step)
    return state


def best_steps(root: Path, sae: int) -> set[int]:
    """Steps of the best ones of an SAE that any checkpoint names: they must not go before it."""
    steps = set()
    for path, step in _files(root):
        if path.suffix == ".json":
            try:
                state = read_state(root, step)
            except FormatError:  # nobody can go on from it
                continue
            if sae < len(state.saes) and (best := state.saes[sae].best) is not None:
                steps.add(best.step)
    return steps


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


def load_checkpoint(
    root: Path,
    wanted: Container[int] | None = None,
    check: Callable[[State], None] = lambda _: None,
    fell_back: Callable[[FormatError, int], None] = lambda *_: None,
) -> tuple[State, list[dict[str, Tensor]]] | None:
    """The newest checkpoint that is whole: its state and each SAE's tensors.

    Args:
        root: folder of the run.
        wanted: numbers of the SAEs whose tensors are needed, the others' are empty; None: all. The
            files of all are checked.
        check: raises `FormatError` if what lies beside a checkpoint is not what it names.
        fell_back: hears why a newer one is not taken, and the step of the one that is.

    Returns:
        None if there is none yet.

    Raises:
        FormatError: there are some, and all are damaged. It is told of the newest.
    """
    steps = sorted({step for path, step in _files(root) if path.suffix == ".json"}, reverse=True)
    first: FormatError | None = None
    for step in steps:
        try:
            state = read_state(root, step)
            tensors = [
                _load(root, state, i, wanted is None or i in wanted) for i in range(len(state.saes))
            ]
            check(state)
        except FormatError as error:
            first = first or error
        else:
            if first is not None:
                fell_back(first, step)
            return state, tensors
    if first is not None:
        raise FormatError(
            first.what,
            expected=first.expected,
            got=first.got,
            remedy="no other checkpoint is whole (--keep-last 2 keeps one to fall back to): "
            "restore it from a copy, or remove checkpoint-* there and begin the run anew with "
            "--resume",
        ) from first
    return None


def load_parts(
    root: Path, step: int, wanted: Container[int]
) -> tuple[State, list[dict[str, Tensor]]]:
    """Some SAEs of the checkpoint that another process has chosen, and found whole.

    Args:
        root: folder of the run.
        step: steps done then.
        wanted: their numbers; the others' tensors are empty, and their files are not looked at.

    Raises:
        FormatError: it is not whole here.
    """
    state = read_state(root, step)
    return state, [_load(root, state, i) if i in wanted else {} for i in range(len(state.saes))]


def _load(root: Path, state: State, sae: int, wanted: bool = True) -> dict[str, Tensor]:
    """The tensors of one SAE, or none; raises `FormatError` if its file is not what was written."""
    path, promised = tensors_path(root, state.step, sae), state.saes[sae].file
    got: object = digest_file(path) if path.is_file() else "nothing"
    try:
        if got == promised:
            return load(path.read_bytes()) if wanted else {}
    except SafetensorError as error:
        got = error
    raise FormatError(f"{path} is not what its checkpoint wrote", expected=promised, got=got)


def _seal(state: object) -> str:
    """Digest over all of a state but the digest itself."""
    plain = json.loads(to_json(state))
    plain["seal"] = None
    return xxhash.xxh3_128(to_json(plain)).hexdigest()


@dataclass(frozen=True)
class Best:
    """The best that one SAE has been."""

    step: int
    """Steps done then."""
    fvu: float
    """On the held-out rows of --val-rows."""
    file: FileDigest
    """Of its weights."""
