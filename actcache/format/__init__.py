"""The cache format: what each file of a cache contains. FORMAT.md specifies it.

These modules define the manifest, the receipts, the shard plan, the types rows are stored in, the
statistics and the schemas of the tensor files. They read and write JSON; rows are read and written
in `actcache.storage`.
"""

__all__ = [
    "dtypes",
    "manifest",
    "receipts",
    "row_filters",
    "schema",
    "shard_plan",
    "statistics",
]
