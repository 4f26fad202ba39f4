"""Exception classes for errors of the user, with a structured message and an exit code each."""

from __future__ import annotations

import errno

_LONGEST = 4000  # characters of one field of a message
_INDENT = " " * 12


class ActcacheError(Exception):
    """An error that the user can fix. The command line prints its text without a traceback.

    Args:
        what: the problem, naming the path, shard or option.
        expected: a correct value.
        got: the value found instead.
        remedy: the action that fixes it.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, expected: object = None, got: object = None, remedy: str | None = None
    ) -> None:
        self.what = quote_name(_bounded(what))
        self.expected = None if expected is None else _bounded(expected)
        self.got = None if got is None else _bounded(got)
        self.remedy = remedy
        lines = [self.what]
        lines += [f"  expected: {_indented(self.expected)}"] if self.expected is not None else []
        lines += [f"  got:      {_indented(self.got)}"] if self.got is not None else []
        lines += [f"  remedy:   {remedy}"] if remedy is not None else []
        super().__init__("\n".join(lines))


def quote_name(text: str) -> str:
    r"""Escape line ends and tabs, so that a name that holds them cannot forge a line of output."""
    return text.replace("\n", r"\n").replace("\r", r"\r").replace("\t", r"\t")


def _indented(text: str) -> str:
    """Indent all lines but the first, so that no name within them can look like our own line."""
    first, *others = text.split("\n")
    return "\n".join([first, *(f"{_INDENT}{line.removeprefix(_INDENT)}" for line in others)])


def _bounded(value: object) -> str:
    """Return a value as text, cut: values of damaged files may have any length."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # too many digits, too deep
        text = f"a value of type {type(value).__name__} that is too long to show"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class ConfigError(ActcacheError):
    """An option, or a combination of options, is invalid."""

    exit_code = 2


class DatasetError(ActcacheError):
    """The dataset cannot be found or read, or is too short."""

    exit_code = 3


class ModelError(ActcacheError):
    """The model or its tokenizer cannot be found, loaded or hooked."""

    exit_code = 4


class HookpointError(ActcacheError):
    """The model or the cache does not have the hookpoint."""

    exit_code = 5


class FormatError(ActcacheError):
    """A file does not follow its format: a manifest, a receipt, a header, a run record."""

    exit_code = 6


class CacheMismatchError(ActcacheError):
    """The folder holds another cache or run than the command describes."""

    exit_code = 7


class RestoreError(CacheMismatchError):
    """A damaged shard cannot be made again in the same bytes here; it is left as it is."""

    exit_code = 15


class CorruptShardError(ActcacheError):
    """The bytes of a published file differ from its receipt."""

    exit_code = 8


class EmptyCacheError(ActcacheError):
    """The cache has too few complete shards for the command."""

    exit_code = 9


class DiskFullError(ActcacheError):
    """The disk has too little free space for the files to be written."""

    exit_code = 10


class RunError(ActcacheError):
    """A training run cannot be started, resumed or evaluated with these options."""

    exit_code = 11


class CacheBusyError(ActcacheError):
    """Another harvest or fit holds the lock of the folder."""

    exit_code = 12


class RemoteError(ActcacheError):
    """The object store behind a URL does not respond, or denies access."""

    exit_code = 13


class FileSystemError(ActcacheError):
    """The file system of a folder lacks what the work needs, such as locks."""

    exit_code = 14


OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate",
    "unable to allocate",
    "bad_alloc",
)
"""Parts of the messages of torch, NumPy, C++ and CUDA for memory that is not there."""
NO_THREAD = "can't start new thread"
_OF_SYSTEM = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shortage_of(error: BaseException) -> BaseException | None:
    """Return the lack of memory, threads, files or disk space that caused an exception, if any.

    Libraries that load models and datasets report it as a fault of what they load.
    """
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return cause
        if isinstance(cause, OSError) and cause.errno in _OF_SYSTEM:
            return cause
        if isinstance(cause, RuntimeError) and NO_THREAD in text:
            return cause
        if any(part in text for part in OUT_OF_MEMORY):
            return MemoryError(str(cause))
        if "too many open files" in text:  # of a library in Rust
            return OSError(errno.EMFILE, str(cause))
        cause = cause.__cause__ or cause.__context__
    return None
