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
from actcache.adapters.torch_dataset import LoaderDataset, WholeBatches

__all__ = [
    "DictionaryLearningBuffer",
    "Feed",
    "HookpointBatches",
    "LoaderDataset",
    "NumpyBatches",
    "SaeLensBatches",
    "WholeBatches",
    "open_feed",
]
