"""A cache's rows as other trainers take them: shuffled, float32, resumable.

`open_feed` makes a `Feed`; the rest turn it into what a trainer wants. No peer is imported here.
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
