"""Metrics of a run: metrics.jsonl (reproducible), timings.jsonl (not), and a progress bar."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash

from actcache.core.json_codec import decode_json, truncated_repr
from actcache.core.process import peak_memory
from actcache.core.progress import Progress
from actcache.errors import FormatError
from actcache.filesystem.atomic import FileDigest, as_disk_full_error, open_log, write_atomic
from saetrain.runs.own_files import digest_bytes

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
_RESTORE = "it is damaged; restore it from a copy"


class MetricsSink(Protocol):
    """A second destination of the metrics, such as `saetrain.tracking.wandb_mirror`."""

    def log(self, line: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> None:
        """Log a line of metrics.jsonl and, unless None, the line of timings.jsonl of that step."""

    def end(self) -> None:
        """Mark the run as finished; its SAEs are saved."""

    def close(self) -> None:
        """Close the sink, whether the run is finished or not."""


class JsonlTracker:
    """Writer of metrics.jsonl and timings.jsonl, which also updates the progress bar.

    A resumed run first truncates both files to its checkpoint's step, so that metrics.jsonl ends up
    the same as without an interruption.

    Args:
        root: folder of the run.
        step: steps done.
        steps: steps of the whole run.
        batch_size: rows of a step.
        row_bytes: bytes on disk of a row of all hookpoints.
    """

    def __init__(
        self, root: Path, step: int, steps: int, batch_size: int, row_bytes: int = 0
    ) -> None:
        self._root, self._batch_size, self._row_bytes = root, batch_size, row_bytes
        kept, _ = truncate_after(root / METRICS, step), truncate_after(root / TIMINGS, step)
        self._size, self._digest = len(kept), xxhash.xxh3_128(kept)
        metrics, timings = last_line(root / METRICS, key="saes"), last_line(root / TIMINGS)
        if timings is not None and (metrics is None or timings["step"] != metrics["step"]):
            raise FormatError(f"{root} lost a line of {METRICS} or {TIMINGS}", remedy=_RESTORE)
        self._files = {name: open_log(root / name) for name in (METRICS, TIMINGS)}
        self.bar = Progress("fit", steps * batch_size, "rows", initial=step * batch_size)
        self._began = self._last = time.monotonic()
        self._first_step = self._last_step = step
        self._waited = 0.0
        self._held_out: dict[str, str] = {}
        self.mirror: MetricsSink | None = None
        """Sink that receives a copy of every line."""
        self.on_line: Callable[[int, Mapping[str, Mapping[str, Any]]], None] | None = None
        """Called with the steps done and the metrics of every line, by the SAE's name."""

    def log(self, step: int, metrics: Mapping[str, Mapping[str, Any]], waited: float) -> None:
        """Write one line of each file.

        Args:
            step: steps done.
            metrics: means since the last line, by the SAE's name.
            waited: seconds spent waiting for rows since the run was last started.
        """
        now = time.monotonic()
        rows = (step - self._last_step) * self._batch_size
        seconds = max(now - self._last, 1e-9)
        timings = {
            "step": step,
            "rows_per_second": rows / seconds,
            "bytes_per_second": rows * self._row_bytes / seconds,
            "mean_rows_per_second": self._rows_per_second(step, now - self._began),
            "data_wait": (waited - self._waited) / seconds,
            "seconds": now - self._began,
            "peak_memory_bytes": peak_memory(),
            **peak_device_memory(),
        }
        line = {"step": step, "rows": step * self._batch_size, "saes": metrics}
        self._write(METRICS, line)
        self._write(TIMINGS, timings)
        if self.mirror is not None:
            self.mirror.log(line, timings)
        waiting = f"{timings['data_wait']:.0%}"
        notes = {"fvu": _range(metrics), **self._held_out, "data_wait": waiting}
        self.bar.advance(rows, rows * self._row_bytes, **notes)
        self._last, self._last_step, self._waited = now, step, waited
        if self.on_line is not None:
            self.on_line(step, metrics)

    def log_held_out(
        self, step: int, figures: Mapping[str, Mapping[str, float]], rows: int
    ) -> None:
        """Write a validation line to metrics.jsonl.

        Args:
            step: steps done.
            figures: FVU and L0 by the SAE's name.
            rows: number of held-out rows.
        """
        line = {"step": step, "rows": step * self._batch_size, "val_rows": rows, "val": figures}
        self._write(METRICS, line)
        if self.mirror is not None:
            self.mirror.log(line)
        self._held_out = {"val_fvu": _range(figures)}

    @property
    def seconds(self) -> float:
        """Seconds from the start to the last line."""
        return self._last - self._began

    @property
    def rows_per_second(self) -> float:
        """Rows per second from the start to the last line."""
        return self._rows_per_second(self._last_step, self.seconds)

    def sync(self) -> None:
        """Flush all lines to disk, which must precede the checkpoint of their step."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def metrics_digest(self) -> FileDigest:
        """Return size and digest of metrics.jsonl so far, which its checkpoint records."""
        return FileDigest(self._size, self._digest.hexdigest())

    def end(self) -> None:
        """Mark the run as finished."""
        if self.mirror is not None:
            self.mirror.end()

    def close(self) -> None:
        """Close all outputs."""
        if self.mirror is not None:
            self.mirror.close()
        self.bar.close()
        for file in self._files.values():
            file.close()

    def _rows_per_second(self, step: int, seconds: float) -> float:
        return (step - self._first_step) * self._batch_size / max(seconds, 1e-9)

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, allow_nan=False).encode()
        if name == METRICS:
            self._size += len(text) + 1
            self._digest.update(text + b"\n")
        else:  # no checkpoint covers what varies from run to run
            text = with_check(text)
        text += b"\n"
        written = 0
        try:
            while written < len(text):
                written += self._files[name].write(text[written:])
        except OSError as error:
            raise as_disk_full_error(error, self._root / name, len(text)) from error


def truncate_after(path: Path, step: int) -> bytes:
    """Remove the lines after a step, and an incomplete last line; return the lines kept.

    Raises:
        FormatError: a complete line is damaged.
    """
    if not path.exists():
        return b""
    data, kept = path.read_bytes(), 0
    for line in _complete_lines(data) if step else []:
        if _parse(path, line)["step"] > step:
            break
        kept += len(line) + 1
    if kept < len(data):
        write_atomic(path, [data[:kept]])
    return data[:kept]


def cut_to_checkpoint(path: Path, expected: FileDigest) -> None:
    """Remove what follows the lines that a checkpoint covers; see `require_lines`."""
    require_lines(path, expected)
    if path.exists() and path.stat().st_size > expected.bytes:
        write_atomic(path, [path.read_bytes()[: expected.bytes]])


def require_lines(path: Path, expected: FileDigest) -> None:
    """Raise `FormatError` unless a file begins with the lines that a checkpoint covers."""
    data = path.read_bytes() if path.exists() else b""
    found = digest_bytes(data[: expected.bytes])
    if found != expected:
        raise FormatError(
            f"{path} differs from the lines that its checkpoint covers",
            expected=expected,
            got=found,
            remedy=_RESTORE,
        )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return all lines of a truncated .jsonl file; raises `FormatError` if one is damaged."""
    return [
        _parse(path, line) for line in _complete_lines(path.read_bytes() if path.exists() else b"")
    ]


def with_check(text: bytes) -> bytes:
    """Return the JSON of an object with a checksum of its own as the last key.

    timings.jsonl varies from run to run, so no checkpoint can cover it.
    """
    return text[:-1] + f', "{_CHECK}": "{xxhash.xxh3_64(text).hexdigest()}"}}'.encode()


_CHECK = "xxh3_64"
_CHECKED = re.compile(rb'(.*), "xxh3_64": "([^"]*)"\}', re.DOTALL)


def _complete_lines(data: bytes) -> list[bytes]:
    """Return the lines that end with a newline, without it."""
    return data.split(b"\n")[:-1]


def _range(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the lowest and the highest FVU."""
    found = sorted(f"{figure['fvu']:.4f}" for figure in figures.values())
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def last_line(path: Path, step: int | None = None, key: str | None = None) -> dict[str, Any] | None:
    """Return the last complete line of a .jsonl file that matches; None if there is none.

    Args:
        path: the file.
        step: largest step; None: any.
        key: a key that the line must have; None: any.

    Raises:
        FormatError: a line read from the end is damaged.
    """
    for text in reversed(_complete_lines(path.read_bytes() if path.exists() else b"")):
        line = _parse(path, text)
        if (step is None or line["step"] <= step) and (key is None or key in line):
            return line
    return None


def sae_metrics(path: Path, line: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return every SAE's metrics in a line of metrics.jsonl; raises `FormatError`."""
    saes = line.get("saes")
    for name in names:
        sae = saes.get(name) if isinstance(saes, dict) else None
        metrics = sae if isinstance(sae, dict) else {}
        numbers = [metrics.get(key) for key in ("fvu", "l0")]
        if metrics.get("dead_percent", "") is not None:  # None: too few rows so far
            numbers.append(metrics.get("dead_percent"))
        if not all(map(_is_number, numbers)):
            raise FormatError(
                f"{path} lacks figures of {name} at step {line['step']}",
                expected="fvu, l0, dead_percent",
                got=truncated_repr(sae),
                remedy=_RESTORE,
            )
    assert isinstance(saes, dict)
    return saes


def number_of(path: Path, line: dict[str, Any], key: str) -> float:
    """Return one number of a line; raises `FormatError`."""
    value = line.get(key)
    if not _is_number(value):
        raise FormatError(
            f"{path} lacks {key} at step {line['step']}",
            expected="a number",
            got=truncated_repr(value),
            remedy=_RESTORE,
        )
    return float(value)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        line = decode_json(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "a line that is not JSON", text) from error
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise _damaged(path, "a line without a step", text)
    if (match := _CHECKED.fullmatch(text)) and with_check(match[1] + b"}") != text:
        raise _damaged(path, "a line that differs from its checksum", text)
    line.pop(_CHECK, None)
    return line


def _damaged(path: Path, what: str, text: bytes) -> FormatError:
    return FormatError(
        f"{path} holds {what}",
        got=truncated_repr(text),
        remedy=_RESTORE,
    )


def peak_device_memory() -> dict[str, int]:
    """Return the largest tensor memory so far on one GPU, bytes; empty if CUDA is not in use."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    devices = range(torch.cuda.device_count())
    return {"peak_device_memory_bytes": max(map(torch.cuda.max_memory_allocated, devices))}
