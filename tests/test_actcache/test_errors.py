from __future__ import annotations

from actcache import errors
from actcache.errors import ActcacheError, ConfigError, FormatError


def test_the_message_contains_what_expected_got_and_remedy() -> None:
    error = ConfigError("--k is too large", expected="<= 8", got=0, remedy="a smaller --k")
    assert str(error) == (
        "--k is too large\n  expected: <= 8\n  got:      0\n  remedy:   a smaller --k"
    )


def test_missing_fields_are_omitted_from_the_message() -> None:
    assert str(ConfigError("no", remedy="yes")) == "no\n  remedy:   yes"


def test_every_error_class_has_its_own_exit_code() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, ActcacheError)
    ]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes) > 8
    assert all(0 < code < 126 for code in codes)


def test_long_values_are_cut_in_the_message() -> None:
    error = FormatError("x" * 10**6, expected="y" * 10**6, got="z" * 10**6)
    assert 10_000 < len(str(error)) < 20_000
