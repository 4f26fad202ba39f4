"""Iterators over a feed in the calling process, for NumPy, SAELens and dictionary_learning.

Letters: B rows of a batch, D d_in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from actcache.adapters.feed import Feed
from actcache.errors import ConfigError
from actcache.format.manifest import INPUT
from actcache.stream.activation_stream import Batch

if TYPE_CHECKING:
    import torch


T = TypeVar("T")


class Batches(ABC, Generic[T]):
    """Batches of a feed, converted to float32, which is exact for every type on disk.

    Prefetch starts with the first batch. It ends with `close`, at the end of a `with` block, or
    when the iterator is garbage-collected.

    Args:
        feed: the rows.
        device: torch device of the batches.
    """

    def __init__(self, feed: Feed, device: str | torch.device = "cpu") -> None:
        self.feed, self.device = feed, device
        self._stream = feed.stream()

    @abstractmethod
    def _convert(self, batch: Batch) -> T: ...

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        """Return the next batch; an error of the reading threads is raised here."""
        return self._convert(next(self._stream))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the prefetch. Taking another batch is an error afterwards."""
        self._stream.close()

    def state_dict(self) -> dict[str, int]:
        """Return the position of the next batch, to be saved with the trainer's state."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a state of the same feed. Only allowed before the first batch."""
        self._stream.load_state_dict(state)


class NumpyBatches(Batches[NDArray[np.float32]]):
    """Batches of one hookpoint as NumPy arrays. Each float32 [B, D]"""

    def __init__(self, feed: Feed) -> None:
        super().__init__(feed)
        self._hookpoint = only_hookpoint(feed)

    def _convert(self, batch: Batch) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = batch.activations[self._hookpoint].float().numpy()
        return rows


class HookpointBatches(Batches["dict[str, torch.Tensor]"]):
    """Aligned batches of several hookpoints by name, for SAELens's `MultiSAETrainer`.

    Row i is the same token at every hookpoint, as transcoders and crosscoders require. Each float32
    [B, D]
    """

    def _convert(self, batch: Batch) -> dict[str, torch.Tensor]:
        return to_float32(batch, self.device)


class SaeLensBatches(Batches["torch.Tensor"]):
    """Batches of one hookpoint, for SAELens 6's `SAETrainer`. Each float32 [B, D]

    `batch_size` is the trainer's `train_batch_size_samples`. The estimate of the activations' scale
    (`normalize_activations`) consumes the first batches, and training starts after them.

    Args:
        feed: the rows; endless, since the trainer stops by its own count of samples.
        device: torch device of the batches.
    """

    def __init__(self, feed: Feed, device: str | torch.device = "cpu") -> None:
        super().__init__(feed, device)
        self._hookpoint = only_hookpoint(feed)

    def _convert(self, batch: Batch) -> torch.Tensor:
        return to_float32(batch, self.device)[self._hookpoint]


class DictionaryLearningBuffer(SaeLensBatches):
    """Batches of one hookpoint: `data` for dictionary_learning's `trainSAE`. Each float32 [B, D]

    Pass the trainer's device: its first step requires the batches there.
    """

    @property
    def config(self) -> dict[str, object]:
        """Return the settings that `trainSAE` saves under "buffer", under its own names."""
        manifest = self.feed.cache.manifest
        name, plan = self._hookpoint, self.feed.plan
        return {
            "d_submodule": manifest.width(name),
            "io": "in" if name.endswith(INPUT) else "out",
            "ctx_len": manifest.identity.ctx_len,
            "out_batch_size": plan.batch_size,
            "device": str(self.device),
            "hookpoint": name,
            "cache_id": manifest.cache_id,
            "receipts_digest": self.feed.cache.digest([shard for shard, _ in plan.shards]),
            "seed": plan.seed,
        }


def only_hookpoint(feed: Feed) -> str:
    """Return the hookpoint of a feed; raise `ConfigError` if it has more than one."""
    if len(feed.hookpoints) != 1:
        raise ConfigError(
            "these batches are of one hookpoint",
            expected="one name",
            got=feed.hookpoints,
            remedy="a feed of one hookpoint; or HookpointBatches, which gives all by name",
        )
    return feed.hookpoints[0]


def to_float32(batch: Batch, device: str | torch.device) -> dict[str, torch.Tensor]:
    """Convert a batch's rows by hookpoint on a device. Each float32 [n, D]"""
    import torch

    return {
        name: rows.to(device).to(torch.float32)  # copied in the smaller type first
        for name, rows in batch.activations.items()
    }
