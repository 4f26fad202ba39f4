"""One cache folder: created, written shard by shard, read, verified, repaired and converted.

`folder` names the files, computes their sizes and publishes the manifest, `writer` publishes a
shard, `reader` is `Cache`, `verify` compares every byte with the receipts, `repair` retracts
damaged shards, `flipped_bits` corrects single bits, `restore` publishes shards again, `convert`
copies a cache to another backend or type, `sinks` finds rows of large norm that hold most of the
variance.
"""

__all__ = [
    "convert",
    "flipped_bits",
    "folder",
    "reader",
    "repair",
    "restore",
    "sinks",
    "verify",
    "writer",
]
