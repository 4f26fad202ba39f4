"""Description of the machine, and the table of a benchmark. Needs torch only."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine(*packages: str, device: torch.device | None = None) -> str:
    """Return one line: CPU or GPU, cores, versions of Python, torch and the named packages.

    Args:
        packages: beside torch.
        device: where it ran; None: on a GPU if there is one.
    """
    on_cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    where = torch.cuda.get_device_name() if on_cuda else _processor()
    names = ("torch", *packages)
    return ", ".join([where, f"Python {platform.python_version()}", *map(_versioned, names)])


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table with aligned columns, ready for benchmarks/README.md."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for n, row in enumerate((header, *rows)):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
        if n == 0:
            print("| " + " | ".join("-" * w for w in widths) + " |")


def _versioned(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} (absent)"


def _processor() -> str:
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
