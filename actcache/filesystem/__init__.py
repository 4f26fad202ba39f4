"""Files as a cache sees them: on local disks and in object stores, whole or not there at all.

`atomic` writes a file so that it appears complete or not at all. `paths` is the one interface to
folders and URLs; `urls` opens a URL, through `object_store` (requests with retries), `block_cache`
(fetched blocks, kept on this machine) and `remote_path` (a store's files as paths).
"""

__all__ = [
    "atomic",
    "block_cache",
    "object_store",
    "paths",
    "remote_path",
    "urls",
]
