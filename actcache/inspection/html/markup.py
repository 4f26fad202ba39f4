"""Markup in which nothing from outside can be anything but text.

Elements are made by `tag`, and what is not `Markup` is escaped on its way in; so a page is
well-formed XML, too, whatever the cache says.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from actcache.inspection.printable import printable

_VOID = {"meta"}
_LIMIT = 10_000  # characters that one piece of text may have


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """One element.

    Args:
        name: of the element.
        children: elements, or text, which is escaped.
        attributes: their values are escaped; an underscore in a name is a hyphen, one at its end
            nothing (`class_`). None: no such attribute.
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
    """Elements and texts, one after another."""
    return Markup("".join(c if isinstance(c, Markup) else _escaped(c) for c in children))


def section(title: str, *children: Markup) -> Markup:
    """A part of the page under a heading."""
    return tag("section", tag("h2", title), *children)


def scroll(child: Markup) -> Markup:
    """What may be wider than the page."""
    return tag("div", child, class_="scroll", tabindex=0)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table; columns that begin with a number stand right, others left."""
    words = [bool(rows) and not _is_number(cell) for cell in (rows[0] if rows else header)]
    kinds = ["word" if word else None for word in words]
    head = tag("tr", *(tag("th", n, class_=k) for n, k in zip(header, kinds, strict=True)))
    lines = [
        tag("tr", *(tag("td", cell, class_=k) for cell, k in zip(row, kinds, strict=True)))
        for row in rows
    ]
    return scroll(tag("table", tag("thead", head), tag("tbody", *lines)))


def _escaped(text: str) -> str:
    lines = text.split("\n")  # ends of lines are harmless, and some text needs them
    return html.escape("\n".join(printable(line, _LIMIT) for line in lines))


def _is_number(cell: str) -> bool:
    return not isinstance(cell, Markup) and cell.lstrip("-")[:1].isdigit()
