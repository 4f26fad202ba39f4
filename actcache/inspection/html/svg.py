"""Plots as SVG inside a page, coloured by its style sheet. Each has a title for screen readers.

Coordinates are CSS pixels at full size; plots shrink with the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from actcache.inspection.dimensions import Dimensions
from actcache.inspection.facts import format_number
from actcache.inspection.html.markup import Markup, join, tag
from actcache.inspection.norms import NormHistogram

_LABELLED = 40
"""Largest number of lines that are labelled one by one; of more, every n-th is labelled."""


def _number(value: float) -> str:
    return format_number(value, digits=3)


def norm_plot(norms: NormHistogram, title: str) -> Markup:
    """Draw a norm histogram with its axis."""
    width, height, left, bottom = 460, 170, 44, 24
    total, top = sum(norms.counts), max(norms.counts, default=0)
    if top <= 0:
        return tag("p", "No finite rows.", class_="muted")
    step = (width - left - 8) / len(norms.counts)
    room = height - bottom - 12
    bars, edges = [], norms.edges
    for i, count in enumerate(norms.counts):
        x, tall = left + i * step, max(room * count / top, 1.0 if count else 0.0)
        span = f"{_number(edges[i])} to {_number(edges[i + 1])}"
        text = f"{span}: {count:,} rows ({count / total:.2%})"
        bars.append(_bar(x, 12 + room - tall, max(step - 1, 0.5), tall, text))
    every = -(-len(edges) // 6)
    labels = [
        _label(left + i * step, height - 8, _number(edges[i]), anchor="middle")
        for i in range(0, len(edges), every)
    ]
    labels.append(_label(left - 6, 20, f"{top / total:.1%}", anchor="end"))
    labels.append(_label(left - 6, 12 + room, "0", anchor="end"))
    return _svg(width, height, title, _axis(left, 12 + room, width - 8), *bars, *labels)


def norm_spark(norms: NormHistogram, first: int, end: int, title: str) -> Markup:
    """Draw a norm histogram for a table: without axis, from bin `first` to bin `end`."""
    width, height = 180, 26
    step = width / max(end - first, 1)
    top = max(norms.counts, default=0)
    bars = []
    for i, count in enumerate(norms.counts):
        tall = max((height - 2) * count / top, 1.5) if count > 0 else 0.0
        x = (norms.first_bin - first + i) * step
        bars.append(_bar(x, height - tall, max(step - 0.5, 0.5), tall))
    return _svg(width, height, title, *bars, class_="spark")


def dimension_plot(dimensions: Dimensions, width_of_rows: int, title: str) -> Markup:
    """Draw the RMS of every dimension on a logarithmic scale, with outliers marked and labelled."""
    width, height, left, bottom = 460, 170, 44, 24
    finite = [rms for rms in dimensions.profile if 0 < rms < math.inf]
    if not finite:
        return tag("p", "All dimensions are 0.", class_="muted")
    low, high = math.log10(min(finite)), math.log10(max(finite))
    high = max(high, low + 0.1)
    room = height - bottom - 22

    def x_of(dimension: float) -> float:
        return left + (width - left - 8) * dimension / width_of_rows

    def y_of(rms: float) -> float:
        at = (math.log10(rms) - low) / (high - low) if 0 < rms < math.inf else 0.0
        return 22 + room * (1 - min(max(at, 0.0), 1.0))

    base = 22 + room
    points = [
        f"{x_of((i + 0.5) * dimensions.profile_step):.1f},{y_of(rms):.1f}"
        for i, rms in enumerate(dimensions.profile)
    ]
    parts = [tag("polyline", points=" ".join(points), class_="profile")]
    if 0 < dimensions.median_rms < math.inf:
        level = f"{y_of(dimensions.median_rms):.1f}"
        parts.append(tag("line", x1=left, x2=width - 8, y1=level, y2=level, class_="median"))
    taken: list[float] = []
    for d in dimensions.largest:
        if not d.outlier:
            continue
        x, y = x_of(d.dimension + 0.5), y_of(d.rms)
        text = tag("title", f"dimension {d.dimension}: RMS {_number(d.rms)}, {_number(d.ratio)}x")
        parts.append(tag("circle", text, cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.5, class_="mark"))
        if all(abs(x - other) > 30 for other in taken):
            at = min(max(x, left + 14), width - 22)
            parts.append(_label(at, y - 7, str(d.dimension), anchor="middle", class_="mark-label"))
            taken.append(x)
    parts += [
        _label(left - 6, 28, _number(max(finite)), anchor="end"),
        _label(left - 6, base, _number(min(finite)), anchor="end"),
        _label(left, height - 8, "0"),
        _label(width - 8, height - 8, str(width_of_rows - 1), anchor="end"),
    ]
    return _svg(width, height, title, _axis(left, base, width - 8), *parts)


def heat_map(matrix: Sequence[Sequence[float | None]], names: Sequence[str], title: str) -> Markup:
    """Draw the cosines between all pairs of names."""
    n = len(names)
    cell = max(6.0, min(34.0, 620 / n))
    left = 8 + 7.2 * min(max(map(len, names)) + 5, 35)
    top = 22.0
    parts = []
    every = -(-n // _LABELLED)
    for i, line in enumerate(matrix):
        if i % every == 0:
            label = names[i] if len(names[i]) <= 30 else "…" + names[i][-29:]
            label += f" ({i + 1})"
            y = top + (i + 0.5) * cell + 4
            parts.append(_label(left - 6, y, label, anchor="end"))
            if cell >= 16 or i % 5 == 0:
                parts.append(_label(left + (i + 0.5) * cell, top - 6, str(i + 1), anchor="middle"))
        for j, cosine in enumerate(line):
            text = "different widths" if cosine is None else f"{cosine:.3f}"
            parts.append(
                tag(
                    "rect",
                    tag("title", f"{names[i]} ~ {names[j]}: {text}"),
                    x=f"{left + j * cell:.1f}",
                    y=f"{top + i * cell:.1f}",
                    width=f"{cell - 1:.1f}",
                    height=f"{cell - 1:.1f}",
                    class_="none" if cosine is None else ("cold" if cosine < 0 else "hot"),
                    fill_opacity=None if cosine is None else f"{min(abs(cosine), 1.0):.2f}",
                )
            )
            if cell >= 30 and cosine is not None:
                x, y = left + (j + 0.5) * cell, top + (i + 0.5) * cell + 4
                strong = "on" if abs(cosine) > 0.75 else "off"
                parts.append(_label(x, y, f"{cosine:.2f}", anchor="middle", class_=strong))
    size = n * cell
    return _svg(left + size + 4, top + size + 4, title, *parts, class_="heat")


def bars(
    rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], title: str, room: float = 420
) -> Markup:
    """Draw horizontal bars, one per row.

    Args:
        rows: (name, segments), each segment (CSS class, length, label).
        title: title of the plot.
        room: width of the longest bar.
    """
    top = max((sum(length for _, length, _ in bar) for _, bar in rows), default=0) or 1
    left = 12 + 7.2 * max((len(name) for name, _ in rows), default=0)
    shown = []
    for i, (name, segments) in enumerate(rows):
        y, x = 4 + i * 24, left
        shown.append(_label(left - 8, y + 14, name, anchor="end"))
        for kind, length, label in segments:
            long = room * length / top
            shown.append(_bar(x, y, long, 18, label, class_=kind))
            x += long
        text = "; ".join(label for _, length, label in segments if length)
        shown.append(_label(x + 8, y + 14, text))
    longest = max((len("; ".join(s for _, _, s in p)) for _, p in rows), default=0)
    return _svg(left + room + 16 + 7 * longest, 8 + 24 * len(rows), title, *shown, class_="bars")


def _svg(width: float, height: float, title: str, *parts: Markup, class_: str = "plot") -> Markup:
    return tag(
        "svg",
        tag("title", title),
        *parts,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        role="img",
        class_=class_,
    )


def _bar(
    x: float, y: float, wide: float, tall: float, text: str = "", class_: str = "bar"
) -> Markup:
    title = (tag("title", text),) if text else ()
    return tag(
        "rect",
        *title,
        x=f"{x:.1f}",
        y=f"{y:.1f}",
        width=f"{wide:.1f}",
        height=f"{tall:.1f}",
        class_=class_,
    )


def _label(
    x: float, y: float, text: str, anchor: str | None = None, class_: str | None = None
) -> Markup:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def _axis(x1: float, y: float, x2: float) -> Markup:
    return join(tag("line", x1=f"{x1:.1f}", x2=f"{x2:.1f}", y1=y, y2=y, class_="axis"))
