"""The best SAE of a run so far, by its held-out FVU, beside the last one.

It lies in `SAE/best-STEP/`, as others load it, and its step is part of every checkpoint. The one
that the newest checkpoint names stays until a newer checkpoint names another: so whenever a run is
killed, it goes on as if it had not been.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from saetrain.formats.sparsify import save_sae
from saetrain.runs.checkpoint import Best
from saetrain.runs.record import SaeEntry

_FOLDER = re.compile(r"best-([0-9]{9,})")


def best_folder(sae: Path, step: int) -> Path:
    """Where the SAE in a folder lies as it was after a step."""
    return sae / f"best-{step:09d}"


def save_best(
    sae: Path, entry: SaeEntry, weights: Mapping[str, Tensor], unit: bool, step: int, fvu: float
) -> Best:
    """Write an SAE that is better than all before it. Those before it stay, see `keep_only`."""
    folder = best_folder(sae, step)
    return Best(step, fvu, save_sae(folder, entry.config, weights, entry.reads, unit))


def keep_only(sae: Path, steps: Collection[int | None]) -> None:
    """Remove the best ones of all other steps, and what a kill left of any."""
    if not sae.is_dir():
        return
    for folder in sorted(sae.iterdir()):
        match = _FOLDER.fullmatch(folder.name)
        if match and int(match[1]) not in steps:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
