"""Builders for harvests: options, a model loaded once, faults of the disk."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def options(tiny_model: Path, prose_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """A factory of small HarvestConfigs: two hookpoints, three shards; any option may be set."""
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


@pytest.fixture
def warm_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load every model and tokenizer once a test: for tests that harvest a hundred times."""
    from actcache.harvester import job, resolve

    def by_model(load: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[Any, Any] = {}

        @functools.wraps(load)
        def once(config: Any, *rest: Any) -> Any:
            key = (
                config.model,
                config.model_dtype,
                config.load_in,
                config.device_map,
                config.max_memory,
            )
            if key not in known:
                known[key] = load(config, *rest)
            return known[key]

        return once

    for name in ("load_config", "load_tokenizer", "probe_model"):
        monkeypatch.setattr(resolve, name, by_model(getattr(resolve, name)))
    monkeypatch.setattr(job, "load_model", by_model(job.load_model))


class Crash(BaseException):
    """The process is gone: nothing handles this, nothing cleans up."""


class Faults:
    """Stands in for the calls that write, and lets one of them fail."""

    CALLS = ("posix_fallocate", "pwrite", "fsync", "replace", "unlink")
    Crash = Crash

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    @contextlib.contextmanager
    def at(self, number: int, error: BaseException | None = None) -> Iterator[None]:
        """Let the call with this number, counted from 0, raise `error`: by default, crash.

        A `pwrite` that fails has written half of its bytes.
        """
        counter = iter(range(10**9))
        with self._monkeypatch.context() as patched:
            # Partial files bear the writer's number: one that is gone had another than ours.
            patched.setattr(os, "getpid", lambda: 10**6 + number)
            for name in self.CALLS:
                real = getattr(os, name)

                def call(*args: Any, name: str = name, real: Any = real) -> Any:
                    if next(counter) != number:
                        return real(*args)
                    if name == "pwrite":
                        fd, data, offset = args
                        real(fd, data[: len(data) // 2], offset)
                    raise error or Crash

                patched.setattr(os, name, call)
            yield


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Injects crashes and errors into the calls that write."""
    return Faults(monkeypatch)
