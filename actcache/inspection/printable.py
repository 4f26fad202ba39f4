"""Text from a cache, made fit to be shown: whatever it holds, it moves no cursor and ends."""

from __future__ import annotations

_NAMED = {" ": "·", "\n": "⏎", "\t": "⇥"}


def printable(text: str, limit: int = 300) -> str:
    r"""Text of at most `limit` characters, with escapes for all that does not print.

    Control characters, escape sequences, marks that change the direction of writing and lone
    surrogates become `\x1b` and the like; terminals, HTML and XML take what is left.
    """
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def visible(token: str, limit: int = 60) -> str:
    """The text of one token, with signs for spaces and ends of lines; else as `printable`."""
    return printable("".join(_NAMED.get(c, c) for c in token[: limit + 1]), limit)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
