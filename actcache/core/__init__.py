"""Small tools that every other part uses, and that know nothing of caches.

`json_codec` parses JSON into frozen dataclasses, `options` declares the options of a command,
`file_lock` locks a folder, `distributed` holds rank and world size, `device` chooses one,
`progress` draws a bar and formats numbers, and `rng` derives NumPy's frozen random streams from a
seed and a purpose.
"""

__all__ = [
    "device",
    "distributed",
    "file_lock",
    "json_codec",
    "options",
    "progress",
    "rng",
]
