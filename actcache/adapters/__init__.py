"""Adapters that give a cache's rows to other trainers: shuffled, float32, resumable.

`open_feed` creates a `Feed`; the classes convert it to the interfaces of NumPy, torch's DataLoader,
SAELens and dictionary_learning. None of these trainers is imported.
"""

from actcache.adapters.feed import Feed, open_feed
from actcache.adapters.iterators import (
    DictionaryLearningBuffer,
    HookpointBatches,
    NumpyBatches,
    SaeLensBatches,
)
from actcache.adapters.torch_dataset import CacheDataLoader, CacheDataset

__all__ = [
    "CacheDataLoader",
    "CacheDataset",
    "DictionaryLearningBuffer",
    "Feed",
    "HookpointBatches",
    "NumpyBatches",
    "SaeLensBatches",
    "open_feed",
]

LoaderDataset, WholeBatches = CacheDataset, CacheDataLoader  # their former names
