"""The facts of an inspection as one HTML page that needs no network and no other file.

`page` renders the page and its sections, `svg` draws the plots and `markup` escapes text and builds
tags.
"""

__all__ = ["markup", "page", "svg"]
