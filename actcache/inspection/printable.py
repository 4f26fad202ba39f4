"""Escaping of untrusted text from a cache: no control characters, and a limited length."""

from __future__ import annotations

_NAMED = {" ": "·", "\n": "⏎", "\t": "⇥"}


def printable(text: str, limit: int = 300) -> str:
    r"""Cut text to `limit` characters and escape those that are not printable.

    Control characters, escape sequences, marks that change the direction of writing and lone
    surrogates become escapes like `\x1b`. The result is safe for terminals, HTML and XML.
    """
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def visible(token: str, limit: int = 60) -> str:
    """Escape the text of one token, with visible signs for spaces, tabs and line ends."""
    return printable("".join(_NAMED.get(c, c) for c in token[: limit + 1]), limit)
