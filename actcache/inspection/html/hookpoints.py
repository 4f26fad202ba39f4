"""Hookpoints on the page: a table, plots of each, and how alike they are."""

from __future__ import annotations

from actcache.core.progress import format_bytes
from actcache.inspection.dimensions import OUTLIER
from actcache.inspection.html import svg
from actcache.inspection.html.markup import Markup, scroll, section, table, tag
from actcache.inspection.norms import edge, span_of
from actcache.inspection.summary import CacheSummary, HookpointSummary

CARDS = 64
"""Hookpoints with plots of their own, and in the heat map."""
TABLE = 500
"""Hookpoints in the table."""


def hookpoints(summary: CacheSummary) -> Markup:
    """Sizes, norms and counts of every hookpoint."""
    first, end = span_of([h.norms for h in summary.hookpoints])
    span = f"norms, {svg.number(edge(first))} to {svg.number(edge(end))}"
    header = ["hookpoint", "width", "size", "mean norm", "RMS norm", "max norm", "max |x|"]
    rows = [
        [
            h.hookpoint,
            str(h.width),
            format_bytes(h.bytes),
            svg.number(h.mean_norm),
            svg.number(h.rms_norm),
            svg.number(h.max_norm),
            svg.number(h.abs_max),
            svg.norm_spark(h.norms, first, end, f"norms of {h.hookpoint}"),
            str(h.dimensions.outliers),
            f"{h.non_finite:,}",
        ]
        for h in summary.hookpoints[:TABLE]
    ]
    more = len(summary.hookpoints) - len(rows)
    return section(
        "Hookpoints",
        tag(
            "p",
            "Norms on one logarithmic scale; bars relative to each hookpoint's tallest.",
            class_="muted",
        ),
        table([*header, span, "outlier dims", "non-finite"], rows),
        tag("p", f"and {more:,} more hookpoints", class_="muted") if more else Markup(""),
    )


def cards(summary: CacheSummary) -> Markup:
    """Histogram and dimensions of each hookpoint."""
    chosen = summary.hookpoints[:CARDS]
    more = len(summary.hookpoints) - len(chosen)
    said = (
        f"An outlier (orange) has an RMS, or a largest |x|, of at least {OUTLIER:g} times the "
        "median dimension's (dashed)."
    )
    if more:
        said += f" The first {CARDS} hookpoints; {more} more are in the table."
    return section(
        "Norms and dimensions",
        tag("p", said, class_="muted"),
        tag("div", *(_card(h) for h in chosen), class_="cards"),
    )


def _card(h: HookpointSummary) -> Markup:
    q = h.norms.quantile
    rows = [
        [
            str(d.dimension),
            svg.number(d.rms),
            f"{svg.number(d.ratio)}x",
            svg.number(d.mean),
            svg.number(d.abs_max),
            f"{d.variance_share:.1%}",
        ]
        for d in h.dimensions.largest[:5]
    ]
    quantiles = f"median {svg.number(q(0.5))}, 1% above {svg.number(q(0.99))}"
    step = h.dimensions.profile_step
    each = "" if step == 1 else f", the largest of every {step}"
    return tag(
        "article",
        tag("h3", h.hookpoint),
        tag(
            "figure",
            svg.norm_plot(h.norms, f"{h.hookpoint}: rows by norm, {quantiles}"),
            tag("figcaption", f"rows by norm; {quantiles}"),
        ),
        tag(
            "figure",
            svg.dimension_plot(
                h.dimensions,
                h.width,
                f"{h.hookpoint}: RMS by dimension, outliers: {h.dimensions.outliers}",
            ),
            tag("figcaption", f"RMS by dimension{each}; outliers: {h.dimensions.outliers}"),
        ),
        table(["dimension", "RMS", "of median", "mean", "max |x|", "variance"], rows),
        class_="card",
    )


def cosines(summary: CacheSummary) -> Markup:
    """Cosines between mean rows, as a heat map."""
    matrix = [line[:CARDS] for line in summary.mean_cosines[:CARDS]]
    if len(matrix) < 2:
        return Markup("")
    names = [h.hookpoint for h in summary.hookpoints[: len(matrix)]]
    said = "Cosine of the angle between mean rows: blue towards 1, orange below 0."
    plot = svg.heat_map(matrix, names, "cosine of mean rows between hookpoints")
    return section("How alike the means are", tag("p", said, class_="muted"), scroll(plot))
