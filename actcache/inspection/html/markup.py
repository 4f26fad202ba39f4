"""Markup in which untrusted text stays text.

Elements are made by `tag`, which escapes every string that is not `Markup`. So a page is also
well-formed XML for any content of the cache.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from actcache.inspection.printable import printable

_VOID = {"meta"}
_LIMIT = 10_000  # largest number of characters of one text


class Markup(str):
    """Text that is already escaped."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """Build one element.

    Args:
        name: name of the element.
        children: elements, or text, which is escaped.
        attributes: values are escaped; an underscore in a name becomes a hyphen, one at the end is
            dropped (`class_`). None: the attribute is omitted.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{pairs}/>")
    return Markup(f"<{name}{pairs}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Concatenate elements and texts; texts are escaped."""
    return Markup("".join(c if isinstance(c, Markup) else _escaped(c) for c in children))


def section(title: str, *children: Markup) -> Markup:
    """Build a section of the page under a heading."""
    return tag("section", tag("h2", title), *children)


def scroll(child: Markup) -> Markup:
    """Wrap an element that may be wider than the page in a scrolling box."""
    return tag("div", child, class_="scroll", tabindex=0)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Build a table; columns that start with a number are right-aligned, others left-aligned."""
    numeric = [
        not isinstance(c, Markup) and c.lstrip("-")[:1].isdigit() for c in (rows or [header])[0]
    ]
    kinds = [None if number or not rows else "word" for number in numeric]
    head = tag("tr", *(tag("th", n, class_=k) for n, k in zip(header, kinds, strict=True)))
    lines = [
        tag("tr", *(tag("td", cell, class_=k) for cell, k in zip(row, kinds, strict=True)))
        for row in rows
    ]
    return scroll(tag("table", tag("thead", head), tag("tbody", *lines)))


def _escaped(text: str) -> str:
    lines = text.split("\n")  # line ends are safe, and preformatted text needs them
    return html.escape("\n".join(printable(line, _LIMIT) for line in lines))
