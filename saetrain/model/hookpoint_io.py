"""Selection of the hookpoints that an SAE reads and predicts, and concatenation of their rows.

Letters: N tokens, D d_in, E width of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.errors import HookpointError, RunError
from actcache.format.hookpoint_names import find_in_cache
from actcache.format.manifest import INPUT
from saetrain.model.losses import OutputSlice

if TYPE_CHECKING:
    from actcache.cache.reader import Cache
    from actcache.format.statistics import Statistics
    from saetrain.config.fit_config import FitConfig
    from saetrain.config.sae import SaeEntry


CROSSCODER = "crosscoder"
"""Name of a crosscoder, which has several hookpoints, and of its folder."""


class HookpointRoles(NamedTuple):
    """Input and target hookpoints of one SAE."""

    name: str
    """Name of the SAE in its run."""
    reads: tuple[str, ...]
    """Hookpoints it reads; empty: the hookpoint `name`."""
    predicts: tuple[str, ...]
    """Hookpoints it predicts; empty: those it reads."""


def assign_hookpoints(config: FitConfig, cache: Cache) -> list[HookpointRoles]:
    """List the SAEs of a run with their hookpoints, in the cache's order.

    Raises:
        HookpointError: the cache does not hold the hookpoints that the options select.
    """
    if config.transcode:
        return [
            HookpointRoles(name, (name + INPUT,), (name,)) for name in _with_input(config, cache)
        ]
    names = _choose(config, cache, cache.hookpoints)
    if not config.crosscode:
        return [HookpointRoles(name, (), ()) for name in names]
    if len(names) < 2:
        raise HookpointError(
            "--crosscode takes several hookpoints",
            expected=f"at least two of {' | '.join(cache.hookpoints)}",
            got=names[0],
        )
    return [HookpointRoles(CROSSCODER, tuple(names), ())]


def _with_input(config: FitConfig, cache: Cache) -> list[str]:
    """List the selected hookpoints whose module's input is in the cache too."""
    outputs = [name for name in cache.hookpoints if not name.endswith(INPUT)]
    pairs = [name for name in outputs if name + INPUT in cache.hookpoints]
    for name in config.hookpoint:
        if name in outputs and name not in pairs:
            raise _no_input(cache, name)
    if not pairs:
        raise _no_input(cache, outputs[0] if outputs else "NAME")
    return _choose(config, cache, pairs)


def _no_input(cache: Cache, name: str) -> HookpointError:
    return HookpointError(
        f"{cache.root} holds no input of {name} to transcode from",
        expected=name + INPUT,
        got=" | ".join(cache.hookpoints),
        remedy=f"harvest with --hookpoint {name} --hookpoint {name}{INPUT}",
    )


def _choose(config: FitConfig, cache: Cache, names: Sequence[str]) -> list[str]:
    """List the hookpoints that match the patterns or are meant by them, in the cache's order."""
    chosen: set[str] = set()
    for pattern in config.hookpoint or ("*",):
        found = [name for name in names if fnmatchcase(name, pattern)]
        found = found or find_in_cache(pattern, names, cache.manifest.architecture)
        if not found:
            raise HookpointError(
                f"{cache.root} holds no hookpoint that matches {pattern!r}",
                expected=" | ".join(names),
                got=pattern,
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def hookpoints_of(entries: Iterable[SaeEntry]) -> list[str]:
    """List the hookpoints of all SAEs in order, without duplicates."""
    return list(dict.fromkeys([name for entry in entries for name in entry.hookpoints]))


def rows_of(entry: SaeEntry, activations: Mapping[str, Tensor]) -> Tensor:
    """Concatenate an SAE's rows of a batch: [N, D], or for a transcoder [N, D + E]."""
    names = entry.hookpoints
    if len(names) == 1:
        return activations[names[0]]
    return torch.cat([activations[name] for name in names], dim=1)


class TargetStats(NamedTuple):
    """Statistics of the rows that an SAE is trained on, after their input scale."""

    mean: NDArray[np.float64]
    """Mean target row. [E]"""
    variance: float
    """Variance of the target: mean of ‖y - mean‖²."""
    unit: float
    """Root of the variance of the input: the unit of the pre-activations."""
    parts: tuple[OutputSlice, ...]
    """Columns of each hookpoint of a crosscoder; empty for other SAEs."""


def target_stats(entry: SaeEntry, statistics_of: Callable[[str], Statistics]) -> TargetStats:
    """Compute the statistics of an SAE's training rows from those of its hookpoints.

    Args:
        entry: the SAE.
        statistics_of: returns the statistics of a hookpoint's training rows.

    Raises:
        RunError: the rows of a hookpoint have no variance.
    """
    names, sources, targets = entry.hookpoints, entry.sources, entry.targets
    means, variances = {}, {}
    for name, scale in zip(names, entry.scales or (1.0,) * len(names), strict=True):
        statistics = statistics_of(name)
        variance = statistics.variance
        if not variance > 0:
            raise RunError(
                f"the training rows of {name} do not vary",
                expected="a variance above 0",
                got=variance,
                remedy="leave this hookpoint out",
            )
        means[name], variances[name] = statistics.mean * scale, variance * scale**2
    parts = tuple([OutputSlice(name, len(means[name]), variances[name]) for name in targets])
    return TargetStats(
        mean=np.concatenate([means[name] for name in targets]),
        variance=sum(variances[name] for name in targets),
        unit=float(np.sqrt(sum(variances[name] for name in sources))),
        parts=parts if len(parts) > 1 else (),
    )
