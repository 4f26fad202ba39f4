"""Utilities without knowledge of caches, used by every other subpackage.

`json_codec` parses JSON into frozen dataclasses, `options` declares the options of a command,
`process` holds rank, world size and device of this process, `progress` draws progress bars and
formats sizes, `rendezvous` connects processes, `rng` derives NumPy's frozen random streams from a
seed and a purpose, `terminal` escapes what is printed, `watchdog` handles signals, and `bus_errors`
that of truncated maps.
"""

__all__ = [
    "arguments",
    "bus_errors",
    "json_codec",
    "options",
    "process",
    "progress",
    "rendezvous",
    "rng",
    "terminal",
    "watchdog",
]
