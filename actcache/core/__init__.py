"""Utilities without knowledge of caches, used by every other subpackage.

`json_codec` parses JSON into frozen dataclasses, `library_errors` has remedies for errors of
other libraries, `options` declares the options of a command, `process` holds rank, world size and
device of this process and the warnings of libraries in it, `progress` draws progress bars and
formats sizes, `rendezvous` connects processes, `rng` derives NumPy's frozen random streams from a
seed and a purpose, `terminal` escapes what is printed, `watchdog` handles signals, and `bus_errors`
that of truncated maps.
"""

__all__ = [
    "arguments",
    "bus_errors",
    "json_codec",
    "library_errors",
    "options",
    "process",
    "progress",
    "rendezvous",
    "rng",
    "terminal",
    "watchdog",
]
