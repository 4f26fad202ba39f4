from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import actcache.adapters
from actcache.adapters import NumpyBatches, open_feed
from actcache.cache.reader import Cache
from actcache.errors import ConfigError, EmptyCacheError, HookpointError
from actcache.stream.order import POOL_ROWS, make_plan, split_shards


@pytest.fixture(scope="module")
def root(make_cache: Callable[..., Path]) -> Path:
    return make_cache(shards=6)  # of 128 rows each


def test_plan_and_split_are_those_of_a_run_with_the_same_options(root: Path) -> None:
    from saetrain.config.fit_config import FitConfig
    from saetrain.launch.run import fit
    from saetrain.runs.record import read_run

    options = {"batch_size": 48, "seed": 7, "val_fraction": 0.3, "pool_rows": 200}
    feed = open_feed(root, "layers.0", **options)
    out = root.parent / f"{root.name}-run"
    fit(FitConfig(str(root), str(out), num_latents=32, k=4, device="cpu", **options))
    run = read_run(out)
    assert feed.plan == run.plan
    assert feed.held_out_shards == run.held_out
    defaults = FitConfig("cache", "out")
    parameters = inspect.signature(open_feed).parameters
    assert {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == {
        name: getattr(defaults, name) for name in ("batch_size", "seed", "val_fraction")
    } | {"pool_rows": POOL_ROWS, "epochs": None}


def test_an_open_cache_is_accepted_and_val_fraction_0_holds_out_no_shard(root: Path) -> None:
    feed = open_feed(Cache.open(root), "layers.0", batch_size=48, val_fraction=0)
    assert feed.plan == make_plan([(s, 128) for s in range(6)], 16, 48, seed=0)
    with pytest.raises(ConfigError, match=r"no rows of .* were held out"):
        feed.held_out()


def test_held_out_rows_are_read_once_and_never_in_training(root: Path) -> None:
    feed = open_feed(root, "layers.0", batch_size=64, seed=1, val_fraction=0.3, epochs=2)
    training, held_out = split_shards(range(6), 0.3, seed=1)
    with feed.stream() as stream:
        seen = [tuple(row) for batch in stream for row in batch.addresses]
    assert len(seen) == 2 * len(set(seen)) == 2 * 128 * len(training)
    assert {shard for shard, _ in seen} == set(training)
    with feed.held_out().stream() as stream:
        seen = [tuple(row) for batch in stream for row in batch.addresses]
    assert len(seen) == len(set(seen)) == 128 * len(held_out)
    assert {shard for shard, _ in seen} == set(held_out)


def test_held_out_rows_fewer_than_a_batch_form_one_batch(make_cache: Callable[..., Path]) -> None:
    feed = open_feed(make_cache(sequences=2), "layers.0", batch_size=90, val_fraction=0.25)
    with NumpyBatches(feed.held_out()) as batches:
        assert [len(batch) for batch in batches] == [32]
    with NumpyBatches(feed.held_out(batch_size=8)) as batches:
        assert [len(batch) for batch in batches] == [8] * 4


def test_invalid_arguments_are_rejected_immediately(root: Path, tmp_path: Path) -> None:
    with pytest.raises(EmptyCacheError):
        open_feed(tmp_path, "layers.0")
    with pytest.raises(HookpointError, match=r"layers\.7"):
        open_feed(root, ("layers.0", "layers.7"), batch_size=32)
    with pytest.raises(ConfigError, match="larger than the rows"):
        open_feed(root, "layers.0", batch_size=10_000)


def test_the_stream_of_a_feed_can_include_text(root: Path) -> None:
    with open_feed(root, "layers.0", batch_size=64).stream(text=True) as stream:
        text = next(stream).text
    assert text is not None
    assert np.all(text.positions >= 1)  # position 0 was skipped


def test_no_other_trainer_is_imported() -> None:
    for path in Path(actcache.adapters.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            assert not any(name.startswith(("sae_lens", "dictionary")) for name in names), path
