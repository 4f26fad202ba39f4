"""Fixtures for harvests: options, injected disk faults."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def options(tiny_model: Path, prose_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return a factory of small `HarvestConfig`s: two hookpoints, three shards."""
    from actcache.config import HarvestConfig

    def make(**given: Any) -> HarvestConfig:
        values = {
            "model": str(tiny_model),
            "dataset": str(prose_file),
            "out": str(tmp_path / "cache"),
            "hookpoint": ("layers.0", "layers.1.mlp:in"),
            "ctx_len": 16,
            "max_tokens": 16 * 10,
            "batch_size": 4,
            "shard_size": 4,
        }
        return HarvestConfig(**(values | given))

    return make


class Crash(BaseException):
    """Simulates the death of the process: no handler for `Exception` catches it."""


class Faults:
    """Replaces the system calls that write and makes one of them fail."""

    CALLS = ("posix_fallocate", "pwrite", "fsync", "replace", "unlink")
    Crash = Crash

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    @contextlib.contextmanager
    def at(self, number: int, error: BaseException | None = None) -> Iterator[None]:
        """Make the call with this index, from 0, raise `error`, by default `Crash`.

        A failing `pwrite` first writes half of its bytes.
        """
        counter = iter(range(10**9))
        with self._monkeypatch.context() as patched:
            for name in self.CALLS:
                real = getattr(os, name)

                def call(*args: Any, name: str = name, real: Any = real, **named: Any) -> Any:
                    if next(counter) != number:
                        return real(*args, **named)
                    if name == "pwrite":
                        fd, data, offset = args
                        real(fd, data[: len(data) // 2], offset)
                    raise error or Crash

                patched.setattr(os, name, call)
            yield


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Return an injector of crashes and errors into system calls that write."""
    return Faults(monkeypatch)
