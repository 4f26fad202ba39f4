"""Arguments of the public functions: what has another type is refused before any work."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

import actcache
import saetrain
from actcache.core.arguments import checked
from actcache.errors import ActcacheError, ConfigError
from actcache.filesystem.rooted import RootedPath, rooted
from saetrain.config.sae import SaeConfig

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


def public_functions() -> dict[str, Callable[..., Any]]:
    """Every function, constructor and public method of what both packages export, by name."""
    found = {}
    for package in (actcache, saetrain):
        for name in package.__all__:
            what = getattr(package, name)
            if not inspect.isclass(what):
                found[name] = what
                continue
            for method, member in vars(what).items():
                if method == "__init__" or (callable(member) and method[0] != "_"):
                    found[f"{name}.{method}"] = member
                elif isinstance(member, classmethod) and method[0] != "_":
                    found[f"{name}.{method}"] = getattr(what, method)
    return found


NO_PATHS = {
    "hookpoint", "hookpoints", "name", "part", "device", "verify", "activations", "state",
    "weights", "reads", "receipts",
}  # fmt: skip
"""Parameters with texts, or texts within them, that are no paths."""


class OtherPath:
    """A path of another library."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_a_path_may_be_a_text_or_any_path_in_every_public_function(
    cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    common = {"k": 2, "num_latents": 8, "batch_size": 2, "val_fraction": 0.4, "device": "cpu"}
    saetrain.fit(saetrain.FitConfig(str(cache), str(run), **common))  # type: ignore[arg-type]
    sae, copy = run / "layers.0", tmp_path / "copy"
    weights = dict(saetrain.load_sae(sae).state_dict())

    def save(folder: Any) -> Any:
        saetrain.save_sae(folder, SaeConfig(4, 8, 2), weights)
        return (copy / "sae.safetensors").read_bytes()

    def open_at_url(block_cache: Any) -> Any:
        return actcache.Cache.open(url, block_cache=block_cache).shards, blocks.is_dir()

    blocks, url = tmp_path / "blocks", "memory://paths/cache"
    fsspec.filesystem("memory").put(str(cache), "/paths/cache", recursive=True)
    calls: dict[tuple[str, str], tuple[Callable[[Any], Any], Path]] = {
        ("inspect", "cache"): (actcache.inspect, cache),
        ("verify", "root"): (lambda at: actcache.verify(at).is_sound, cache),
        ("open_feed", "cache"): (
            lambda at: actcache.open_feed(at, "layers.0", batch_size=2).plan, cache,
        ),
        ("Cache.open", "root"): (lambda at: actcache.Cache.open(at).manifest, cache),
        ("Cache.open", "block_cache"): (open_at_url, blocks),
        ("evaluate", "run"): (lambda at: saetrain.evaluate(at).saes, run),
        ("evaluate", "cache_folder"): (lambda at: saetrain.evaluate(run, at).saes, cache),
        ("evaluate", "block_cache"): (
            lambda at: saetrain.evaluate(run, block_cache=at).saes, blocks,
        ),
        ("load_sae", "folder"): (lambda at: str(saetrain.load_sae(at)), sae),
        ("save_sae", "folder"): (save, copy),
    }  # fmt: skip
    walked = set()
    for name, function in public_functions().items():
        if name.endswith("Config.__init__"):  # fields: see test_refusals.py
            continue
        for parameter in inspect.signature(function).parameters.values():
            hint = str(parameter.annotation)
            if "PathLike" in hint:
                walked.add((name, parameter.name))
                assert re.match(r"str \| os\.PathLike\[str\]", hint), (name, hint)
            elif re.search(r"\bstr\b|Path\b", hint) and name != "Cache.__init__":
                assert parameter.name in NO_PATHS, (name, parameter)
    assert walked == calls.keys()
    for called, (call, path) in calls.items():
        found = [call(given) for given in (str(path), path, OtherPath(path))]
        assert found[0] == found[1] == found[2], called


def test_one_item_is_a_list_of_one_in_public_functions(cache: Path, tmp_path: Path) -> None:
    plan = actcache.open_feed(cache, "layers.0", batch_size=2).plan
    opened: Any = actcache.Cache.open(cache)
    assert actcache.inspect(cache, 0) == actcache.inspect(cache, [0])  # type: ignore[arg-type]
    stream = actcache.ActivationStream(opened, "layers.0", plan)
    assert next(iter(stream)).activations.keys() == {"layers.0"}
    stream.close()
    sae = saetrain.Sae(4, 8, 2)
    weights = dict(sae.state_dict())
    saetrain.save_sae(tmp_path, SaeConfig(4, 8, 2), weights, "layers.0")  # type: ignore[arg-type]
    assert json.loads((tmp_path / "cfg.json").read_text())["hookpoints"] == ["layers.0"]
