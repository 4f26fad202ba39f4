"""Correction of sealed files in which one bit has changed: the seal proves the right one.

Every bit is tried, which costs the square of a file's size. The work of one command is bounded, and
what was not tried is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import xxhash

from actcache.core.json_codec import SEAL

_MAX_BYTES = 1 << 16
"""Largest file in which bits are tried: a few seconds."""
_MAX_WORK = 1 << 40
"""Bytes that one command hashes in all: a few minutes, or some thousand receipts."""
_PER_TRIAL = 4096  # bytes that could be hashed in the time which a trial takes besides
_BEFORE = f'\n  "{SEAL}": "'.encode()
_SEAL = re.compile(re.escape(_BEFORE) + b'([0-9a-f]{32})"')
_DIGITS = 32
_ALLOWED = {ord("\n"), *range(32, 128)}
"""Bytes of a sealed file: JSON as `to_json` writes it."""
_FLIPS = [[byte ^ 1 << n for n in range(8) if byte ^ 1 << n in _ALLOWED] for byte in range(256)]
"""What each byte may have been before one of its bits changed."""


class BitSearch:
    """Search of sealed files for the bit that has changed, with a bound on the bytes hashed.

    Args:
        max_work: bytes to hash in all.
    """

    def __init__(self, max_work: int = _MAX_WORK) -> None:
        self._left = max_work
        self._done: set[Path] = set()
        self.untried: set[Path] = set()
        """Files for which there was no work left."""

    def corrected(self, path: Path) -> bytes | None:
        """Return the right contents of a file; None for another kind of damage.

        A file is searched once: later calls return None.
        """
        if path in self._done or path.suffix != ".json":
            return None
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        text = path.read_bytes()
        work = sum(len(_FLIPS[byte]) for byte in text) * (len(text) + _PER_TRIAL)
        if work > self._left:
            self.untried.add(path)
            return None
        self._left -= work
        self._done.add(path)
        self.untried.discard(path)
        return next(_corrections(text), None)


def _corrections(text: bytes) -> Iterator[bytes]:
    for marker in _markers(text):  # first where the key itself is damaged
        for start in _places(text, marker):
            fixed = text[:start] + _BEFORE + text[start + len(_BEFORE) :]
            if _is_sealed(fixed):
                yield fixed
    for start in _places(text, _BEFORE):
        begin = start + len(_BEFORE)
        seal, rest = text[begin : begin + _DIGITS], text[:begin] + text[begin + _DIGITS :]
        got = xxhash.xxh3_128_hexdigest(rest).encode()
        if len(seal) == _DIGITS and _differing_bits(seal, got) == 1:
            yield text[:begin] + got + text[begin + _DIGITS :]
        if (found := _flip_to(rest, seal)) is not None:
            yield found[:begin] + seal + found[begin:]


def _flip_to(rest: bytes, seal: bytes) -> bytes | None:
    """Flip the one bit after which the digest of a file without its seal is the seal, if any."""
    if not re.fullmatch(b"[0-9a-f]{32}", seal):
        return None
    tried, wanted, digest = bytearray(rest), int(seal, 16), xxhash.xxh3_128_intdigest
    odd = [position for position, byte in enumerate(rest) if byte not in _ALLOWED]
    for position in odd[:1] or range(len(rest)):
        for byte in _FLIPS[rest[position]]:
            tried[position] = byte
            if digest(tried) == wanted:
                return bytes(tried)
        tried[position] = rest[position]
    return None


def _markers(text: bytes) -> Iterator[bytes]:
    """Yield the keys before a seal with one flipped bit, if the text has no right one."""
    if _SEAL.search(text):
        return
    for position in range(len(_BEFORE)):
        for bit in range(8):
            marker = bytearray(_BEFORE)
            marker[position] ^= 1 << bit
            yield bytes(marker)


def _places(text: bytes, marker: bytes) -> Iterator[int]:
    start = text.find(marker)
    while start >= 0:
        yield start
        start = text.find(marker, start + 1)


def _is_sealed(text: bytes) -> bool:
    found = _SEAL.search(text)
    if found is None:
        return False
    rest = text[: found.start(1)] + text[found.end(1) :]
    return xxhash.xxh3_128_hexdigest(rest).encode() == found[1]


def _differing_bits(a: bytes, b: bytes) -> int:
    return sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True))
