"""What held a run up: its data, or its compute."""

from __future__ import annotations

from dataclasses import dataclass

from actcache.progress import format_bytes

_DATA = 0.3  # of the time spent waiting: from here on, data are the limit
_COMPUTE = 0.1  # up to here, compute is


@dataclass(frozen=True)
class Waits:
    """Where the time of a run went, seconds."""

    all: float
    """From start to end."""
    rows: float
    """Waiting for rows, whatever the reason."""
    first: float
    """Of that, before the first batch: files are compared, and memory is filled."""
    shards: float
    """Of that, for shards of a harvest at work; in whole seconds."""


def sentence(waits: Waits, bytes_per_second: float, verify: str) -> str:
    """One sentence: what the limit was, and what would help.

    Args:
        waits: where the time went.
        bytes_per_second: that were trained on.
        verify: the option of `fit`.
    """
    share = waits.rows / max(waits.all, 1e-9)
    speed = f"{format_bytes(bytes_per_second)}/s"
    waited = f"{share:.0%} of the time went into waiting for rows, at {speed}"
    if share <= _COMPUTE:
        return (
            f"Compute was the limit ({waited}): a faster device, fewer latents or fewer SAEs at "
            "once would help, a faster disk would not."
        )
    if waits.shards > waits.rows / 2:
        return f"The harvest was the limit ({waited}): this run was waiting for its shards."
    if waits.first > waits.rows / 2:
        spared = "" if verify == "never" else "--verify never after `actcache verify`, "
        return (
            f"The start was the limit ({waited}, most of it before the first step): {spared}"
            "a smaller --buffer-bytes or a longer run would help."
        )
    if share < _DATA:
        return (
            f"Disk and compute kept pace ({waited}): a faster disk helps by that much at most, "
            "then only a faster device."
        )
    return (
        f"The disk was the limit ({waited}): a faster disk, rows of 8 bits (actcache convert "
        "--dtype int8) or more SAEs in one run would help, a faster device would not."
    )
