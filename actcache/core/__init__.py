"""Utilities without knowledge of caches, used by every other subpackage.

`json_codec` parses JSON into frozen dataclasses, `options` declares the options of a command,
`distributed` holds rank and world size, `device` chooses a torch device, `progress` draws progress
bars and formats sizes, and `rng` derives NumPy's frozen random streams from a seed and a purpose.
"""

__all__ = ["device", "distributed", "json_codec", "options", "progress", "rng"]
