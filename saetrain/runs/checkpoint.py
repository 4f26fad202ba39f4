"""Checkpoints: a run's state on disk, from which it resumes bit for bit.

Each SAE has a safetensors file, `RUN/checkpoint-STEP.NUMBER.safetensors`. The last file written,
`RUN/checkpoint-STEP.json`, holds the counters, the digests of all these files, of the exported SAEs
and of metrics.jsonl up to its step, and its own (`seal`). A checkpoint without it is incomplete and
ignored. Older checkpoints are removed once a newer one is complete, except those that the retention
policy keeps. Nothing is pickled.

All files lie directly in RUN, because sparsify loads every folder within a run as an SAE.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import save
from torch import Tensor

from actcache.core.json_codec import SEAL, parse_dataclass, read_json, to_json, truncated_repr
from actcache.errors import FormatError
from actcache.filesystem.atomic import FileDigest, digest_file, write_atomic
from actcache.filesystem.rooted import require_plain
from saetrain.runs.own_files import digest_bytes, is_plain, remove_sae_folder
from saetrain.runs.record import RunRecord
from saetrain.runs.tensors import load_tensors, read_tensors_file

_STEP = "([0-9]{9}|[1-9][0-9]{9,})"  # as `f"{step:09d}"` writes it: no other file is ours
_FILE = re.compile(rf"checkpoint-{_STEP}\.(json|[0-9]{{5}}\.safetensors)")
_BEST = re.compile(f"best-{_STEP}")
_OWN = re.compile(
    _FILE.pattern + r"|(run|segments|exit|eval|eval-best|non-finite)\.json"
    r"|(metrics|timings)\.jsonl|fit\.lock"
)
_MOST_STEPS = 2**53
_SAE_FILES = ("cfg.json", "sae.safetensors")


@dataclass(frozen=True)
class Best:
    """The SAE with the lowest held-out FVU so far (--save-best)."""

    step: int
    """Steps done."""
    fvu: float
    """FVU on the held-out rows of --val-rows."""
    file: FileDigest
    """Digest of its weights file."""
    config: FileDigest | None = None
    """Digest of its cfg.json; null in format 1."""

    def __post_init__(self) -> None:
        """Refuse a step that no run has; the checkpoint checks that it is not later."""
        if not 1 <= self.step <= _MOST_STEPS:
            raise FormatError("a best SAE of an impossible step", expected=">= 1", got=self.step)


@dataclass(frozen=True)
class SaeState:
    """One SAE's entry in a checkpoint."""

    file: FileDigest
    """Digest of its tensors' file."""
    numbers: dict[str, float]
    """State that is not a tensor."""
    export: FileDigest
    """Digest of its weights file in the export format."""
    best: Best | None = None
    """Its best so far, with --save-best."""
    export_config: FileDigest | None = None
    """Digest of its cfg.json in the export format; null in format 1."""


@dataclass(frozen=True)
class State:
    """Contents of checkpoint-STEP.json."""

    step: int
    """Steps done."""
    stream: dict[str, int]
    """Position of the next batch."""
    saes: tuple[SaeState, ...]
    metrics: FileDigest | None = None
    """Digest of metrics.jsonl up to this step; null in format 1."""
    format_version: int = 1
    """1 in a run of format 1, whose files lack this key, else 2."""

    def __post_init__(self) -> None:
        """Check ranges, and that a checkpoint of format 2 has all digests."""
        bests = [sae.best for sae in self.saes if sae.best is not None]
        if not 0 <= self.step <= _MOST_STEPS or any(best.step > self.step for best in bests):
            raise FormatError("a checkpoint of an impossible step", got=self.step)
        if self.format_version not in (1, 2):
            raise FormatError(
                "a checkpoint of another format", expected="1 or 2", got=self.format_version
            )
        digests = [self.metrics, *(sae.export_config for sae in self.saes)]
        digests += [best.config for best in bests]
        if any((digest is None) != (self.format_version == 1) for digest in digests):
            got = f"format {self.format_version}"
            raise FormatError("digests that do not fit the checkpoint's format", got=got)


class ForeignCheckpointError(FormatError):
    """The contents of an undamaged checkpoint are those of another run."""


@dataclass(frozen=True)
class RetentionPolicy:
    """Rule by which checkpoints are kept when newer ones exist."""

    last: int = 1
    """Number of newest checkpoints to keep."""
    every: int | None = None
    """Keep also every checkpoint whose step is a multiple of this."""
    interval: int = 1
    """Steps between scheduled checkpoints (--save-every)."""

    def choose(self, steps: Collection[int]) -> set[int]:
        """Return those of the given steps whose checkpoints are kept.

        A checkpoint between two scheduled ones, which a signal or a wait has made, is kept only as
        the newest. So the result at a scheduled step does not depend on interruptions.
        """
        newest = max(steps, default=0)
        scheduled = [s for s in sorted(steps) if s % self.interval == 0 or self.is_due(s)]
        before = [step for step in scheduled if step < newest]
        last = before[max(0, len(before) - self.last + 1) :]
        return {newest, *last, *filter(self.is_due, steps)}

    def is_due(self, step: int) -> bool:
        """Return whether `every` requires a checkpoint at this step."""
        return self.every is not None and step % self.every == 0


NEWEST = RetentionPolicy()
"""Keep only the newest checkpoint."""


def save_sae_state(
    root: Path,
    step: int,
    sae: int,
    state: tuple[dict[str, Tensor], dict[str, float]],
    export: FileDigest,
    best: Best | None = None,
    export_config: FileDigest | None = None,
) -> SaeState:
    """Write one SAE's tensors. `finalize_checkpoint` needs the result.

    Args:
        root: folder of the run.
        step: steps done.
        sae: index of the SAE in the run.
        state: its tensors and numbers.
        export: digest of its weights file in the export format, written before.
        best: its best so far, written before.
        export_config: digest of its cfg.json, written before; None in a run of format 1.

    Raises:
        DiskFullError: no space; the checkpoint before stays.
    """
    tensors, numbers = state
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    file = write_atomic(tensors_path(root, step, sae), [save(plain)])
    return SaeState(file, numbers, export, best, export_config)


def finalize_checkpoint(
    root: Path,
    step: int,
    stream: dict[str, int],
    parts: Sequence[SaeState],
    keep: RetentionPolicy = NEWEST,
    metrics: FileDigest | None = None,
) -> None:
    """Complete a checkpoint by writing its .json file, then remove older ones.

    Args:
        root: folder of the run.
        step: steps done.
        stream: position of the next batch.
        parts: the SAEs, in the run's order.
        keep: which older checkpoints stay.
        metrics: digest of metrics.jsonl up to this step; None in a run of format 1.
    """
    saes = tuple(parts if metrics is not None else map(_of_format_1, parts))
    state = State(step, stream, saes, metrics, 1 if metrics is None else 2)
    text = to_json(state, sealed=True) if state.format_version > 1 else _in_format_1(state)
    write_atomic(state_path(root, step), [text])
    remove_others(root, step, keep)


def _of_format_1(sae: SaeState) -> SaeState:
    best = None if sae.best is None else dataclasses.replace(sae.best, config=None)
    return dataclasses.replace(sae, best=best, export_config=None)


def _in_format_1(state: State) -> bytes:
    """Return the JSON of a state of format 1, which lacks the keys of format 2."""
    plain = dataclasses.asdict(state)
    del plain["metrics"], plain["format_version"]
    for sae in plain["saes"]:
        del sae["export_config"]
        if sae["best"] is not None:
            del sae["best"]["config"]
    return to_json(plain | {SEAL: _first_seal(plain)})


def _is_of_format_1(obj: object) -> bool:
    return isinstance(obj, dict) and "format_version" not in obj


def _without_first_seal(path: Path, obj: Any) -> dict[str, Any]:
    """Compare a state of format 1 with its seal, which older ones lack; return the other keys."""
    plain = {key: value for key, value in obj.items() if key != SEAL}
    seal, found = obj.get(SEAL), _first_seal(plain)
    if seal is not None and seal != found:
        raise FormatError(f"{path} is damaged", expected=truncated_repr(seal), got=found)
    return plain


def _first_seal(plain: dict[str, Any]) -> str:
    """Return the seal of format 1: the digest of the file with the seal null."""
    return xxhash.xxh3_128_hexdigest(to_json(plain | {SEAL: None}))


def remove_others(root: Path, step: int, keep: RetentionPolicy = NEWEST) -> None:
    """Remove checkpoints newer than `step`, older ones not kept, and incomplete ones."""
    found = _files(root)
    kept = keep.choose({of for path, of in found if path.suffix == ".json" and of <= step})
    others = sorted(path for path, of in found if of not in kept and is_plain(path))
    for other in sorted(others, key=lambda path: path.suffix != ".json"):  # .json files first
        other.unlink()


def newest_step(root: Path) -> int | None:
    """Return the steps done at the newest checkpoint, or None if there is none."""
    return max(_complete(root), default=None)


def newest_state(root: Path) -> State | None:
    """Return the state of the newest checkpoint, if there is one; raises `FormatError`."""
    step = newest_step(root)
    return None if step is None else read_state(root, step)


def read_state(root: Path, step: int) -> State:
    """Return the state of the checkpoint of a step; raises `FormatError` if it is damaged."""
    path = state_path(root, step)
    obj = read_json(path, links=False, sealed=lambda obj: not _is_of_format_1(obj))
    if _is_of_format_1(obj):
        obj = _without_first_seal(path, obj)
    state = parse_dataclass(State, obj, str(path))
    if state.step != step:
        raise FormatError(f"{path} is not of its step", expected=step, got=state.step)
    return state


def best_folder(sae: Path, step: int) -> Path:
    """Return the folder of the best SAE of a step, within the SAE's own folder."""
    return sae / f"best-{step:09d}"


def best_steps(root: Path, sae: int) -> set[int]:
    """Return the steps of an SAE's best that any readable checkpoint names."""
    steps = set()
    for step in _complete(root):
        try:
            state = read_state(root, step)
        except FormatError:  # no run can resume from it
            continue
        if sae < len(state.saes) and (best := state.saes[sae].best) is not None:
            steps.add(best.step)
    return steps


def remove_other_bests(sae: Path, steps: Collection[int | None]) -> None:
    """Remove an SAE's best-STEP folders except those of `steps`, also incomplete ones.

    Links, and folders that hold anything else, stay.
    """
    for folder in sorted(sae.iterdir()) if sae.is_dir() and not sae.is_symlink() else ():
        match = _BEST.fullmatch(folder.name)
        if match and int(match[1]) not in steps:
            remove_sae_folder(folder)


def require_format(root: Path, record: RunRecord, state: State) -> None:
    """Raise an error for a checkpoint of another format, or of other SAEs, than its run's."""
    expected = f"format {min(record.format_version, 2)}, {len(record.saes)} SAEs"
    got = f"format {state.format_version}, {len(state.saes)} SAEs"
    if got != expected:
        raise ForeignCheckpointError(
            f"{state_path(root, state.step)} is a checkpoint of another run",
            expected=expected,
            got=got,
            remedy="restore it from a copy",
        )


def differing_file(folder: Path, named: SaeState | Best) -> Path | None:
    """Return the file of an exported SAE, or of a best one, that differs from its digest, if any.

    Args:
        folder: folder of the SAE.
        named: its entry in a checkpoint.
    """
    weights, config = (
        (named.file, named.config)
        if isinstance(named, Best)
        else (named.export, named.export_config)
    )
    for name, expected in zip(_SAE_FILES, (config, weights), strict=True):
        path = folder / name
        if expected is not None and not (is_plain(path) and digest_file(path) == expected):
            return path
    return None


def require_own_files(root: Path, saes: Iterable[str]) -> None:
    """Raise `FormatError` if a file or folder that a run reads, writes or removes is anything else.

    Args:
        root: folder of the run.
        saes: names of its SAEs.
    """
    files = [path.name for path in root.iterdir() if _OWN.fullmatch(path.name)]
    folders = []
    for sae in saes:
        folders.append(sae)
        folder = root / sae
        if folder.is_dir() and not folder.is_symlink():
            bests = [path.name for path in folder.iterdir() if _BEST.fullmatch(path.name)]
            folders += [f"{sae}/{best}" for best in bests]
    files += [f"{folder}/{file}" for folder in folders for file in _SAE_FILES]
    require_plain(root, files, folders)


def state_path(root: Path, step: int) -> Path:
    """Return the path of a checkpoint's .json file."""
    return root / f"checkpoint-{step:09d}.json"


def tensors_path(root: Path, step: int, sae: int) -> Path:
    """Return the path of one SAE's tensors in a checkpoint."""
    return root / f"checkpoint-{step:09d}.{sae:05d}.safetensors"


def _files(root: Path) -> list[tuple[Path, int]]:
    """Return every file of a checkpoint, complete or not, with its step."""
    matches = [(path, _FILE.fullmatch(path.name)) for path in root.iterdir()]
    return [(path, int(match[1])) for path, match in matches if match]


def _complete(root: Path) -> set[int]:
    """Return the steps of all complete checkpoints."""
    return {step for path, step in _files(root) if path.suffix == ".json" and is_plain(path)}


def load_checkpoint(
    root: Path,
    wanted: Container[int] | None = None,
    check: Callable[[State], None] = lambda _: None,
    fell_back: Callable[[FormatError, int], None] = lambda *_: None,
    accept: Callable[[State, list[dict[str, Tensor]]], None] = lambda *_: None,
) -> tuple[State, list[dict[str, Tensor]]] | None:
    """Load the newest good checkpoint: its state and each SAE's tensors.

    Args:
        root: folder of the run.
        wanted: indices of the SAEs whose tensors are loaded (the others' are empty); None: all.
            The files of all SAEs are compared with their digests.
        check: raises `FormatError` if files that the checkpoint names have changed.
        fell_back: called with the error of each newer checkpoint and the step loaded.
        accept: raises `FormatError` if the run cannot go on from what was loaded.

    Returns:
        None if there is no checkpoint.

    Raises:
        ForeignCheckpointError: a checkpoint is of another run, and none is newer and good.
        FormatError: all checkpoints are refused; the error is that of the newest.
    """
    refused: list[FormatError] = []
    for step in sorted(_complete(root), reverse=True):
        try:
            state = read_state(root, step)
            tensors = [
                _load(root, state, i, wanted is None or i in wanted) for i in range(len(state.saes))
            ]
            check(state)
            accept(state, tensors)
        except ForeignCheckpointError:
            raise
        except FormatError as error:
            refused.append(error)
        else:
            for newer in refused:
                fell_back(newer, step)
            return state, tensors
    if refused:
        first = refused[0]
        raise FormatError(
            first.what,
            expected=first.expected,
            got=first.got,
            remedy="it is damaged or of another run, and no other checkpoint is whole "
            "(--keep-last 2 keeps one to fall back to): restore it from a copy, or remove "
            "checkpoint-* there and start the run again with --resume",
        ) from first
    return None


def load_parts(
    root: Path, step: int, wanted: Container[int]
) -> tuple[State, list[dict[str, Tensor]]]:
    """Load some SAEs of the checkpoint that rank 0 has chosen and verified.

    Args:
        root: folder of the run.
        step: step of the checkpoint.
        wanted: indices of the SAEs; the others' tensors are empty, and their files are not read.

    Raises:
        FormatError: a file is missing or damaged on this machine.
    """
    state = read_state(root, step)
    return state, [_load(root, state, i) if i in wanted else {} for i in range(len(state.saes))]


def verify_checkpoint(root: Path, state: State) -> None:
    """Compare the tensors' files of a checkpoint with their digests; raises `FormatError`."""
    for sae in range(len(state.saes)):
        _load(root, state, sae, wanted=False)


def _load(root: Path, state: State, sae: int, wanted: bool = True) -> dict[str, Tensor]:
    """Verify one SAE's file, and return its tensors if wanted; raises `FormatError`."""
    path, expected = tensors_path(root, state.step, sae), state.saes[sae].file
    got: object = "nothing"
    if is_plain(path):
        size = path.stat().st_size
        if size != expected.bytes:
            got = f"{size} bytes"
        elif not wanted:
            got = digest_file(path)
            if got == expected:
                return {}
        else:
            data = read_tensors_file(path)
            got = digest_bytes(data)
            if got == expected:
                return load_tensors(path, data)
    raise FormatError(f"{path} is not what its checkpoint wrote", expected=expected, got=got)
