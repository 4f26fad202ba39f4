"""Which URLs are taken, and how they are shown: without whatever may be a secret."""

from __future__ import annotations

import re

from actcache.errors import ConfigError

_USER = re.compile(r"(?<=://)[^/?#]*@")
_QUERY = re.compile(r"[?#].*", re.DOTALL)
_LOCAL = ("file", "local")


def masked(url: str) -> str:
    """The URL as errors show it: user, password, query and fragment as stars."""
    return _QUERY.sub("?***", _USER.sub("***@", url))


def require_plain(url: str) -> None:
    """Refuse URLs that are chained, or that hold what belongs into nobody's run.json.

    Raises:
        ConfigError: it is no plain URL.
    """
    protocol, _, rest = url.partition("://")
    shown = masked(url)
    if "::" in url:
        raise ConfigError(
            "chained URLs are not taken",
            expected="one URL, such as s3://bucket/cache",
            got=shown,
            remedy="blocks are kept on this machine in any case; see --block-cache",
        )
    if protocol in _LOCAL:
        raise ConfigError(
            "a folder of this machine is named by its path", expected="a path", got=shown
        )
    if shown != url:
        raise ConfigError(
            "the URL of a cache holds a user, a query or a fragment, which may be a secret",
            expected="scheme://place/of/the/cache",
            got=shown,
            remedy="give credentials and endpoints by the environment, or in fsspec's own "
            "configuration (~/.config/fsspec)",
        )
    if not protocol or not rest.strip("/") or ".." in rest.split("/"):
        raise ConfigError(
            "not the URL of a cache", expected="scheme://place/of/the/cache", got=shown
        )
