"""File access: atomic writes and locks on local disks, and cached reads from object stores.

`rooted` opens, lists and deletes the files of a folder without following links. `atomic` writes a
file so that it appears complete or not at all, and digests it. `lock` locks a folder. `output`
writes the results of commands. `paths` is the common interface to folders and URLs; `urls` opens a
URL, through `object_store` (requests with retries), `block_cache` (fetched blocks, kept on this
machine) and `remote_path` (a store's files as paths). `slow_reads` reports reads that wait for a
disk.
"""

__all__ = [
    "atomic",
    "block_cache",
    "lock",
    "object_store",
    "output",
    "paths",
    "remote_path",
    "rooted",
    "slow_reads",
    "urls",
]
