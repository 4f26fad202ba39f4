"""One cache folder: created, written shard by shard, read, verified, repaired and converted.

`create` publishes the manifest, `layout` names the files and computes their sizes, `writer`
publishes a shard, `reader` is `Cache`, `verify` compares every byte with the receipts,
`retraction` and `repair` withdraw damaged shards and make them again, `convert` copies a cache to
another backend or type.
"""

__all__ = [
    "convert",
    "create",
    "layout",
    "reader",
    "repair",
    "retraction",
    "verify",
    "writer",
]
