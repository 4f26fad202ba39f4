"""Arguments of the public functions: what has another type is refused before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache
import saetrain
from actcache.core.arguments import checked
from actcache.errors import ActcacheError, ConfigError
from actcache.filesystem.rooted import RootedPath, rooted

VALUES: list[Any] = [
    -1, 1.5, math.nan, math.inf, 10**18, 10**5000, "", "x", b"x", True, object(), {}, [[]], [None],
    "a\0b", ["x"], {"x": 1}, torch.tensor(3), "meta", Path("x"),
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., Path]) -> Path:
    return make_cache(shards=3, sequences=2, ctx_len=4, hookpoints={"layers.0": 4})


def refused(call: Callable[..., Any], **given: Any) -> int:
    """Replace each argument by every hostile value; return how many trials were refused."""
    count = 0
    for name in given:
        for value in VALUES:
            try:
                call(**{**given, name: value})
            except ActcacheError:
                count += 1
    return count


@pytest.mark.filterwarnings("ignore")
def test_public_functions_refuse_arguments_of_another_type(cache: Path, tmp_path: Path) -> None:
    config = saetrain.FitConfig(
        str(cache), str(tmp_path / "run"), k=2, num_latents=8, batch_size=2, val_fraction=0.4,
        device="cpu",
    )  # fmt: skip
    saetrain.fit(config)
    feed = actcache.open_feed(cache, "layers.0", batch_size=2)

    def stream(**given: Any) -> None:
        actcache.ActivationStream(**given)

    trials = {
        actcache.inspect: {"cache": cache, "shards": [0]},
        actcache.verify: {"root": cache, "quick": True, "threads": 1},
        actcache.open_feed: {
            "cache": cache, "hookpoint": "layers.0", "batch_size": 2, "seed": 0,
            "val_fraction": 0.1, "pool_rows": 8, "epochs": 1,
        },
        stream: {
            "cache": feed.cache, "hookpoints": ["layers.0"], "plan": feed.plan, "epoch": 0,
            "step": 0, "epochs": 1, "rank": 0, "world_size": 1, "verify": "always",
            "prefetch": 2, "text": False, "device": None,
        },
        saetrain.evaluate: {
            "run": tmp_path / "run", "cache_folder": str(cache), "device": "cpu",
            "block_cache_bytes": None, "best": False,
        },
        saetrain.load_sae: {"folder": tmp_path / "run" / "layers.0", "device": "cpu"},
        saetrain.fit: {"config": config},
        saetrain.vary: {"config": config, "lr": None, "k": 2},
        saetrain.Sae: {"d_in": 4, "num_latents": 8, "k": 2, "d_out": 4, "seed": 0},
        actcache.harvest: {"config": None},
    }  # fmt: skip
    count = sum(refused(call, **given) for call, given in trials.items())
    total = len(VALUES) * sum(map(len, trials.values()))
    assert 0.9 * total < count < total


def test_arguments_become_those_of_the_type_hints() -> None:
    @checked(size=(1, 4))
    def call(
        names: Sequence[str], path: str | Path, size: int, numbers: tuple[float, ...] = ()
    ) -> tuple[Any, ...]:
        return names, path, size, numbers

    given: Any = ("a", rooted("x"), np.int64(3))
    names, path, size, numbers = call(*given, numbers=[1, np.float32(0.5)])  # type: ignore[arg-type]
    assert isinstance(path, RootedPath)
    assert (names, type(size), size, numbers) == (("a",), int, 3, (1.0, 0.5))
    with pytest.raises(ConfigError, match=r"size is out of range\n.*1 to 4"):
        call("a", "x", 5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"path has another type\n.*Path \| a text"):
        call("a", 5, 1)  # type: ignore[arg-type]
