"""Requests to an object store through fsspec, with a timeout, retries and a deadline.

Retries of the store's own library are disabled where possible, so that the constants here decide
how long an outage is tolerated.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from actcache.errors import ConfigError, RemoteError

T = TypeVar("T")

ATTEMPTS = 8
FIRST_DELAY = 0.25
"""Seconds before the second attempt; the delay doubles with each attempt, up to MOST_DELAY."""
MOST_DELAY = 8.0
RETRY_DEADLINE = 60.0
"""Seconds after which no further attempt is made."""
TIME_LIMIT = 30.0
"""Timeout of one attempt, seconds."""
FIRST_NOTICE, NEXT_NOTICE = 10.0, 60.0
"""Seconds after which a wait for a store is reported, and between two reports."""

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_STRONG = ("ETag", "etag", "sha256", "blob_id", "md5Hash", "generation", "ino")
"""Metadata keys of stores that identify the content or version of an object."""
_WEAK = ("LastModified", "last_modified", "last_commit", "updated", "mtime", "modified", "created")
_NO_CREDENTIALS = ("Credential", "TokenNotFound", "ProfileNotFound", "SSO", "TokenRetrieval")
"""Substrings of exception names of stores' libraries, which have no common class."""
_FINAL = (ValueError, TypeError, NotImplementedError, ImportError, AttributeError)
"""Exceptions that are not retried."""


@dataclass(frozen=True)
class Info:
    """Entry of a folder listing."""

    is_folder: bool
    bytes: int
    """Size; -1 if the store does not report it."""
    version: str | None
    """String that changes with the content; None if the store has no versions."""


class ObjectStore:
    """Connection to the folder of a URL. Thread-safe, and usable after a fork.

    Args:
        url: a validated URL of a folder.

    Raises:
        ConfigError: no library supports the protocol, or it is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._lock, self._reporting = Lock(), Lock()
        self._next_report = 0.0
        self._opened: tuple[int, Any, str] | None = None
        _require_library(self.url)

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str]]:
        """Pickle the URL alone: another process opens its own connection."""
        return ObjectStore, (self.url,)

    def listing(self, folder: str) -> dict[str, Info]:
        """List a folder, by name; empty if it does not exist."""
        fs, root = self._filesystem()
        path = f"{root}/{folder}" if folder else root

        def request() -> list[Mapping[str, Any]]:
            fs.invalidate_cache()
            found: list[Mapping[str, Any]] = self._call(fs, "ls", path, detail=True)
            return found

        try:
            entries = self._with_retries(request, folder)
        except FileNotFoundError:
            return {}
        found = {}
        for entry in entries:
            whole = str(entry["name"]).strip("/")
            above, _, name = whole.rpartition("/")
            # A folder may list itself as an empty object; names outside the folder are ignored.
            inside = above.rpartition("/")[2] == path.strip("/").rpartition("/")[2]
            if inside and whole != path.strip("/") and name not in ("", ".", ".."):
                found[name] = _info(entry)
        return found

    def fetch(self, file: str, start: int, stop: int) -> bytes:
        """Fetch bytes [start, stop) of a file.

        Raises:
            FileNotFoundError: the file is gone.
            RemoteError: the store does not deliver them.
        """
        fs, root = self._filesystem()

        def request() -> bytes:
            found = bytes(self._call(fs, "cat_file", f"{root}/{file}", start=start, end=stop))
            if len(found) != stop - start:
                raise OSError(f"{len(found):,} bytes instead of {stop - start:,}")
            return found

        return self._with_retries(request, file)

    def _call(self, fs: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if not fs.async_impl:
            return getattr(fs, method)(*args, **kwargs)
        from fsspec.asyn import sync

        return sync(fs.loop, getattr(fs, f"_{method}"), *args, timeout=TIME_LIMIT, **kwargs)

    def _with_retries(self, request: Callable[[], T], what: str) -> T:
        """Repeat a request with exponential backoff until it succeeds or fails for good."""
        answered = Event()
        Thread(target=self._report, args=(what, answered), name="notice", daemon=True).start()
        try:
            return self._attempts(request, what)
        finally:
            answered.set()

    def _report(self, what: str, answered: Event) -> None:
        """Print what this process waits for: one line for all of its requests."""
        began, pause = time.monotonic(), FIRST_NOTICE
        while not answered.wait(pause):
            now, pause = time.monotonic(), NEXT_NOTICE
            with self._reporting:
                if now < self._next_report or sys.stderr is None:
                    continue
                self._next_report = now + NEXT_NOTICE * 0.9
            text = f"waiting for {self._name(what)} since {now - began:.0f} s"
            print(text, file=sys.stderr, flush=True)  # noqa: T201

    def _attempts(self, request: Callable[[], T], what: str) -> T:
        began = time.monotonic()
        attempt = 0
        while True:
            attempt += 1
            try:
                return request()
            except FileNotFoundError:
                raise
            except Exception as error:
                if final := self._final(error, what):
                    raise final from error
                if attempt == ATTEMPTS or time.monotonic() - began > RETRY_DEADLINE:
                    raise RemoteError(
                        f"{self._name(what)} cannot be read",
                        expected=f"a response within {attempt} attempts",
                        got=_redacted(error),
                        remedy="check that the store can be reached, and run the same command "
                        "again; fetched blocks are kept",
                    ) from error
            delay = min(MOST_DELAY, FIRST_DELAY * 2 ** (attempt - 1))
            time.sleep(delay * (0.5 + random.random()))  # noqa: S311 # jitter between processes

    def _name(self, what: str) -> str:
        return f"{self.url}/{what}" if what else self.url

    def _final(self, error: Exception, what: str) -> RemoteError | None:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        if any(part in kind for kind in kinds for part in _NO_CREDENTIALS):
            return RemoteError(
                f"{self.url} cannot be read: there are no credentials for it",
                expected="credentials in the environment or in the store's own configuration",
                got=_redacted(error),
                remedy="log in with the store's own tool; for a public s3 bucket, "
                "FSSPEC_S3_ANON=true",
            )
        if isinstance(error, PermissionError):
            return RemoteError(
                f"{self._name(what)} may not be read",
                expected="credentials that allow to list and read it",
                got=_redacted(error),
                remedy="request access, or check which credentials are in use",
            )
        if isinstance(error, _FINAL) or "OfflineModeIsEnabled" in kinds:
            return RemoteError(f"{self._name(what)} cannot be read", got=_redacted(error))
        return None

    def _filesystem(self) -> tuple[Any, str]:
        """Return this process's fsspec file system, and the path of the URL in it."""
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                from fsspec.core import url_to_fs

                try:
                    fs, root = url_to_fs(self.url, skip_instance_cache=True, **_options(self.url))
                except Exception as error:
                    raise self._final(error, "") or RemoteError(
                        f"{self.url} cannot be opened", got=_redacted(error)
                    ) from error
                if self.url.startswith(("s3://", "s3a://")):
                    fs.retries = 1
                self._opened = os.getpid(), fs, str(root).rstrip("/")
            return self._opened[1], self._opened[2]


def _require_library(url: str) -> None:
    from fsspec.registry import get_filesystem_class, known_implementations

    protocol = url.partition("://")[0]
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'actcache[{extra}]'" if extra else None
        raise ConfigError(
            f"{protocol}:// needs a library that is not installed",
            expected=known_implementations.get(protocol, {}).get("class", "a library for it"),
            got=_redacted(error),
            remedy=remedy,
        ) from None
    except ValueError:
        raise ConfigError(
            f"fsspec does not support {protocol}://",
            expected="s3, gs, hf, or another of fsspec's",
            got=protocol,
        ) from None


def _options(url: str) -> dict[str, Any]:
    """Return fsspec options that disable S3's own retries, unless the user configured them."""
    from fsspec.config import conf

    if url.startswith(("s3://", "s3a://")) and "config_kwargs" not in conf.get("s3", {}):
        return {"config_kwargs": {"retries": {"total_max_attempts": 1, "mode": "standard"}}}
    return {}


def _info(entry: Mapping[str, Any]) -> Info:
    size = entry.get("size")
    return Info(
        entry.get("type") == "directory",
        size if isinstance(size, int) else -1,
        _version(entry),
    )


def _version(entry: Mapping[str, Any]) -> str | None:
    for keys in (_STRONG, _WEAK):
        values = {key: entry[key] for key in keys if entry.get(key) is not None}
        found = [
            f"{key}={repr(v.timestamp()) if isinstance(v, datetime) else v}"
            for key, v in values.items()
        ]
        if found:
            return ";".join([*found, f"size={entry.get('size')}"])
    return None


@functools.lru_cache(maxsize=1)
def _secrets() -> tuple[str, ...]:
    names = ("KEY", "SECRET", "TOKEN", "PASSWORD")
    return tuple(
        v for k, v in os.environ.items() if len(v) >= 8 and any(n in k.upper() for n in names)
    )


def _redacted(error: BaseException) -> str:
    """Return an error of a library as one line, with secrets of the environment replaced."""
    text = " ".join(str(error).split())[:300]
    for secret in _secrets():
        text = text.replace(secret, "***")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
