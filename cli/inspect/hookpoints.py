"""Hookpoints in the terminal: a table with histograms, what stands out, how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..tables import table
from ..terminal_plots import fit, plot, shade, sparkline

if TYPE_CHECKING:
    from actcache.inspection.summary import CacheSummary, HookpointSummary


FEW = 8
"""Up to so many hookpoints are told one by one; of more, the gist."""
ROWS = 40
"""Lines that a table has at most unless --verbose asks for all."""
SPARK = 16
"""Columns that a norm histogram has at least in the table."""


def hookpoint_table(chosen: Sequence[HookpointSummary], width: int, verbose: bool) -> list[str]:
    """The table: sizes, norms with their histogram on one scale, outlier dimensions."""
    from actcache.core.progress import format_bytes

    shown = chosen if verbose else chosen[:ROWS]
    columns: dict[str, list[str]] = {
        "hookpoint": [fit(h.hookpoint, max(12, width // 4)) for h in shown],
        "width": [str(h.width) for h in shown],
        "bytes": [format_bytes(h.bytes) for h in shown],
        "mean norm": [_figure(h.mean_norm) for h in shown],
        "RMS norm": [_figure(h.rms_norm) for h in shown],
        "max norm": [_figure(h.max_norm) for h in shown],
        "max |x|": [_figure(h.abs_max) for h in shown],
        "non-finite": [f"{h.non_finite:,}" for h in shown],
        "near overflow": [f"{h.near_overflow:,}" for h in shown],
        "outlier dims": [_top_dimension(h) for h in shown],
    }
    for name in ("non-finite", "near overflow"):
        if all(cell == "0" for cell in columns[name]):
            del columns[name]
    taken = {name: 2 + max(map(len, [name, *cells])) for name, cells in columns.items()}
    for name in ("bytes", "RMS norm", "width", "max |x|"):  # what a narrow terminal does without
        if width - sum(taken.values()) < SPARK:
            del columns[name], taken[name]
    room = min(48, max(SPARK, width - sum(taken.values())))
    low, high, sparks = _sparklines(shown, room)
    room = max(map(len, [*sparks, " " * SPARK]))
    ends = f"{low:.3g}", f"{high:.3g}" if high < 1000 else f"{high / 1000:.3g}k"
    title = ends[0] + "norms".center(room - len(ends[0]) - len(ends[1])) + ends[1]
    items = list(columns.items())
    items.insert(-1, (title, [spark.ljust(room) for spark in sparks]))
    header, cells = [name for name, _ in items], [column for _, column in items]
    lines = table(header, list(zip(*cells, strict=True))).splitlines()
    if len(shown) < len(chosen):
        more = len(chosen) - len(shown)
        lines.append(f"and {more} more hookpoints: --verbose, or --hookpoint NAME")
    return lines


def _figure(value: float) -> str:
    """Four digits or so, without an exponent while that is readable."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _top_dimension(h: HookpointSummary) -> str:
    dimensions = h.dimensions
    if not dimensions.outliers:
        return "none"
    top = next((d for d in dimensions.largest if d.outlier), dimensions.largest[0])
    return f"{dimensions.outliers} ({top.dimension}: {top.ratio:.0f}x)"


def _sparklines(shown: Sequence[HookpointSummary], columns: int) -> tuple[float, float, list[str]]:
    """Norm histograms on one axis from the smallest norm of all to the largest."""
    from actcache.inspection.norms import edge, span_of

    first, end = span_of([h.norms for h in shown])
    lines = []
    for h in shown:
        before = h.norms.first_bin - first if h.norms.counts else 0
        after = end - first - before - len(h.norms.counts)
        lines.append(sparkline([0] * before + list(h.norms.counts) + [0] * after, columns))
    return edge(first), edge(end), lines


def outliers(chosen: Sequence[HookpointSummary], width: int) -> list[str]:
    """The largest dimensions of each hookpoint, on one line."""
    from actcache.inspection.dimensions import OUTLIER

    room = max(len(h.hookpoint) for h in chosen)
    count = max(1, min(5, (width - room) // 21))
    lines = [f"largest dimensions: RMS over the median's, share of variance (* from {OUTLIER:g}x)"]
    for h in chosen:
        cells = [
            f"{d.dimension}{'*' if d.outlier else ''} {d.ratio:.3g}x {d.variance_share:.1%}"
            for d in h.dimensions.largest[:count]
        ]
        lines.append(f"{h.hookpoint:<{room}}" + "".join(f"  {cell:<19}" for cell in cells).rstrip())
    return lines


def detail(h: HookpointSummary, width: int) -> list[str]:
    """One hookpoint: its histogram in full, its largest dimensions."""
    q = h.norms.quantile
    lines = [
        f"{h.hookpoint}: norms of {h.rows - h.non_finite:,} finite rows, median {_figure(q(0.5))}, "
        f"1% below {_figure(q(0.01))}, 1% above {_figure(q(0.99))}",
        *plot(h.norms.counts, h.norms.edges, min(width, 100)),
        "",
    ]
    header = ["dimension", "RMS", "over median", "mean", "max |x|", "variance", "outlier"]
    rows = [
        [
            str(d.dimension),
            f"{_figure(d.rms)}",
            f"{d.ratio:.3g}x",
            f"{_figure(d.mean)}",
            f"{_figure(d.abs_max)}",
            f"{d.variance_share:.2%}",
            "yes" if d.outlier else "",
        ]
        for d in h.dimensions.largest
    ]
    lines += table(header, rows).splitlines()
    lines.append(f"median dimension's RMS {_figure(h.dimensions.median_rms)}")
    return lines


def cosines(summary: CacheSummary, width: int) -> list[str]:
    """Cosines between mean rows: numbers while they have room, shades beyond."""
    matrix = summary.mean_cosines
    names = [h.hookpoint for h in summary.hookpoints[: len(matrix)]]
    title = "cosine of mean rows"
    numbers = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    room = max(map(len, numbers))
    if len(names) <= FEW and max(room, len(title)) + 7 * len(names) <= width:
        header = [title, *(f"({n + 1})" for n in range(len(names)))]
        cells = [["-" if c is None else f"{c:.2f}" for c in line] for line in matrix]
        rows = [[name, *line] for name, line in zip(numbers, cells, strict=True)]
        return table(header, rows).splitlines()
    lines = [f"{title}: {shade(0.3)} from 0.2, {shade(0.5)} 0.4, {shade(0.7)} 0.6, {shade(1)} 0.8"]
    columns = max(1, (width - room - 2) // 2)
    if columns < len(names):
        lines[0] += f"; the first {columns} columns"
    lines += [
        f"{name:<{room}}  {''.join(shade(c) for c in line[:columns])}".rstrip()
        for name, line in zip(numbers, matrix, strict=True)
    ]
    return lines


def gist_of_cosines(summary: CacheSummary) -> str:
    """The extremes of the matrix, and of its line beside the diagonal."""
    names = [h.hookpoint for h in summary.hookpoints[: len(summary.mean_cosines)]]
    pairs = [
        (cosine, f"{names[i]} ~ {names[j]}", j == i + 1)
        for i, line in enumerate(summary.mean_cosines)
        for j, cosine in enumerate(line)
        if i < j and cosine is not None
    ]
    if not pairs:
        return "no two of one width"
    low, high = min(pairs), max(pairs)
    text = f"cosines from {low[0]:.2f} ({low[1]}) to {high[0]:.2f} ({high[1]})"
    if neighbours := [pair for pair in pairs if pair[2]]:
        text += f"; of neighbours at least {min(neighbours)[0]:.2f} ({min(neighbours)[1]})"
    return text


def alike(summary: CacheSummary, hookpoint: str) -> list[str]:
    """Other hookpoints by the cosine of their means with this one's."""
    names = [h.hookpoint for h in summary.hookpoints[: len(summary.mean_cosines)]]
    if hookpoint not in names:
        return []
    line = zip(summary.mean_cosines[names.index(hookpoint)], names, strict=True)
    others = sorted(((c, n) for c, n in line if c is not None and n != hookpoint), reverse=True)
    if not others:
        return []
    shown = others if len(others) <= FEW else [*others[:4], *others[-2:]]
    return ["cosine of mean rows with"] + [f"  {name}  {cosine:.3f}" for cosine, name in shown]
