"""The facts of an inspection as one HTML page that needs no network and no other file.

`page` puts the page together, `hookpoints` and `texts` render its sections, `svg` draws the plots
and `markup` escapes text and builds tags.
"""

__all__ = [
    "hookpoints",
    "markup",
    "page",
    "svg",
    "texts",
]
