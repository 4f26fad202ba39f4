from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from actcache.adapters import CacheDataLoader, CacheDataset, Feed, open_feed
from actcache.adapters.torch_dataset import join_parts
from actcache.errors import ConfigError, CorruptShardError, RunError

# torch counts the cores; these tests have little to read.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def root(make_cache: Callable[..., Path]) -> Path:
    return make_cache(shards=6, dtype="bfloat16")


@pytest.fixture(scope="module")
def feed(root: Path) -> Feed:
    feed = open_feed(root, "layers.0", batch_size=72, val_fraction=0, pool_rows=256, epochs=1)
    assert feed.plan.lanes == 36
    return feed


@pytest.fixture(scope="module")
def truth(feed: Feed) -> list[torch.Tensor]:
    """Return the batches of a single process."""
    with feed.stream() as stream:
        return [batch.activations["layers.0"].float() for batch in stream]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def as_set(rows: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in rows}


def test_without_workers_a_loader_returns_the_streams_batches(
    feed: Feed, truth: list[torch.Tensor]
) -> None:
    loader = DataLoader(CacheDataset(feed), batch_size=None)
    assert same(list(loader), truth)
    assert same(list(loader), truth)  # iterating again begins again


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_consecutive_shares_of_the_workers_form_the_batch_of_one_process(
    workers: int, feed: Feed, truth: list[torch.Tensor]
) -> None:
    parts = list(DataLoader(CacheDataset(feed), batch_size=None, num_workers=workers))
    assert len(parts) == workers * len(truth)
    for step, whole in enumerate(truth):
        some = parts[step * workers : (step + 1) * workers]
        assert {part.shape for part in some} == {(72 // workers, 16)}
        assert as_set(torch.cat(some)) == as_set(whole)
        joined = join_parts(some, feed.plan.rows_per_lane_and_batch)
        assert torch.equal(joined, whole)


def test_batches_are_the_same_for_any_number_of_workers_and_ranks(
    feed: Feed, truth: list[torch.Tensor]
) -> None:
    assert same(list(CacheDataLoader(CacheDataset(feed), 2)), truth)
    for rank in range(2):
        expected = [b.reshape(36, 2, 16)[rank::2].reshape(36, 16) for b in truth]  # L, b, D
        dataset = CacheDataset(feed, rank=rank, world_size=2)
        assert same(list(CacheDataLoader(dataset)), expected)
        assert same(list(CacheDataLoader(dataset, 2)), expected)


@pytest.mark.parametrize(("taken", "workers", "then"), [(0, 0, 2), (3, 2, 0), (12, 0, 2)])
def test_batches_resume_exactly_with_another_number_of_workers(
    taken: int, workers: int, then: int, root: Path
) -> None:
    feed = open_feed(root, "layers.0", batch_size=72, val_fraction=0, pool_rows=256)  # endless
    with feed.stream() as stream:
        expected = [next(stream).activations["layers.0"].float() for _ in range(taken + 3)]
    stopped = CacheDataLoader(CacheDataset(feed), workers)
    found = [next(stopped) for _ in range(taken)]
    resumed = CacheDataLoader(CacheDataset(feed), then)
    resumed.load_state_dict(stopped.state_dict())
    found += [next(resumed) for _ in range(3)]
    assert same(found, expected)
    again = CacheDataLoader(CacheDataset(feed))
    again.load_state_dict(resumed.state_dict())
    with feed.stream(**resumed.state_dict()) as stream:
        assert torch.equal(next(again), next(stream).activations["layers.0"].float())
    for batches in (stopped, resumed, again):
        batches.close()
    with pytest.raises(RunError, match="closed"):
        next(again)


def test_a_state_cannot_be_loaded_after_the_first_batch(feed: Feed) -> None:
    batches = CacheDataLoader(CacheDataset(feed))
    next(batches)
    with pytest.raises(RunError, match="have begun"):
        batches.load_state_dict({"epoch": 0, "step": 0})
    batches.close()


def test_the_state_of_a_plain_loader_follows_from_the_count_of_batches(
    feed: Feed, truth: list[torch.Tensor]
) -> None:
    dataset = CacheDataset(feed)
    dataset.load_state_dict(dataset.state_after(4))
    assert dataset.state_after(2) == {"epoch": 0, "step": 6}
    assert dataset.state_after(len(truth)) == {"epoch": 1, "step": 4}
    assert same(list(DataLoader(dataset, batch_size=None)), truth[4:])


def test_workers_that_cannot_share_the_lanes_are_rejected_with_valid_numbers(
    feed: Feed,
) -> None:
    with pytest.raises(ConfigError, match="36 lanes cannot be divided among 5 workers") as caught:
        CacheDataLoader(CacheDataset(feed), 5)
    assert "num_workers 0, 1, 2, 3, 4, 6, 9, 12, 18, 36" in str(caught.value)
    with pytest.raises(ConfigError, match="18 lanes cannot be divided among 4 workers"):
        CacheDataLoader(CacheDataset(feed, 1, 2), 4)
    with pytest.raises(ConfigError, match="36 lanes cannot be divided among 7 processes"):
        CacheDataset(feed, 0, 7)


def test_iteration_in_such_a_worker_raises_the_same_error(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = SimpleNamespace(id=0, num_workers=5)
    monkeypatch.setattr("actcache.adapters.torch_dataset.get_worker_info", lambda: worker)
    with pytest.raises(ConfigError, match="36 lanes cannot be divided among 5 workers"):
        next(iter(CacheDataset(feed)))


def test_several_hookpoints_are_returned_by_name(root: Path) -> None:
    names = ("layers.0", "layers.1")
    feed = open_feed(root, names, batch_size=72, val_fraction=0, pool_rows=256, epochs=1)
    with feed.stream() as stream:
        expected = next(stream).activations
    batches = CacheDataLoader(CacheDataset(feed), 2)
    found = next(batches)
    batches.close()
    for name in names:
        assert torch.equal(found[name], expected[name].float())


def test_a_dataset_is_pickled_to_spawned_workers(feed: Feed, truth: list[torch.Tensor]) -> None:
    dataset = pickle.loads(pickle.dumps(CacheDataset(feed)))
    assert same(list(DataLoader(dataset, batch_size=None)), truth)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_read_error_is_raised_in_the_trainer(
    workers: int, make_cache: Callable[..., Path]
) -> None:
    root = make_cache()
    feed = open_feed(root, "layers.0", batch_size=64)
    for path in (root / "activations" / "layers.0").iterdir():
        path.unlink()
    batches = CacheDataLoader(CacheDataset(feed), workers)
    with pytest.raises(CorruptShardError, match=r"layers\.0"):
        next(batches)
    batches.close()
