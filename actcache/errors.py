"""One class per broken promise; each says what, expected, got and remedy, and has an exit code."""

from __future__ import annotations

_LONGEST = 4000  # characters that one part of a message may have


class ActcacheError(Exception):
    """An error that a user can act on. Its text is the whole message: no traceback is needed.

    Args:
        what: what is wrong, naming the path, shard or option.
        expected: what would have been right.
        got: what was found instead.
        remedy: what to do about it.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, expected: object = None, got: object = None, remedy: str | None = None
    ) -> None:
        self.what = _bounded(what)
        self.expected = None if expected is None else _bounded(str(expected))
        self.got = None if got is None else _bounded(str(got))
        lines = [self.what]
        lines += [f"  expected: {self.expected}"] if self.expected is not None else []
        lines += [f"  got:      {self.got}"] if self.got is not None else []
        lines += [f"  remedy:   {remedy}"] if remedy is not None else []
        super().__init__("\n".join(lines))


def _bounded(text: str) -> str:
    """Values from damaged files stand in errors: they may be of any length."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class ConfigError(ActcacheError):
    """An option, or a combination of options, that cannot be carried out."""

    exit_code = 2


class DatasetError(ActcacheError):
    """The text cannot be found, read, or is too short."""

    exit_code = 3


class ModelError(ActcacheError):
    """The model or its tokenizer cannot be found, loaded or hooked."""

    exit_code = 4


class HookpointError(ActcacheError):
    """A hookpoint that the model or the cache does not have."""

    exit_code = 5


class FormatError(ActcacheError):
    """A file that does not follow its format: a manifest, a receipt, a header, a run."""

    exit_code = 6


class CacheMismatchError(ActcacheError):
    """A cache, or run, that is not the one that was asked for."""

    exit_code = 7


class CorruptShardError(ActcacheError):
    """A published file whose bytes are not those that its receipt promises."""

    exit_code = 8


class EmptyCacheError(ActcacheError):
    """A cache without enough complete shards for what was asked."""

    exit_code = 9


class DiskFullError(ActcacheError):
    """No room for what would be written."""

    exit_code = 10


class RunError(ActcacheError):
    """A training run that cannot be started, resumed or evaluated as asked."""

    exit_code = 11


class CacheBusyError(ActcacheError):
    """A folder in which another harvest, or another fit, is at work."""

    exit_code = 12


class RemoteError(ActcacheError):
    """A store behind a URL that does not answer, or does not let us in."""

    exit_code = 13
