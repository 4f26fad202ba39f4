"""The cache format: what each file of a cache contains, as specified in docs/format.md.

`manifest` defines the identity of a cache, its extensions and its shard plan; `receipts` the
records of published, retracted and complete shards; `dtypes` the types in which rows are stored;
`statistics` the statistics of a shard; `hookpoint_names` the names that other libraries give to
hookpoints. JSON files are read and written here, tensor files in `actcache.storage`.
"""

__all__ = ["dtypes", "hookpoint_names", "manifest", "receipts", "statistics"]
