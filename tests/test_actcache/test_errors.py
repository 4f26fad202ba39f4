from __future__ import annotations

from actcache import errors
from actcache.errors import ActcacheError, ConfigError, FormatError


def test_an_error_says_what_expected_got_and_remedy() -> None:
    error = ConfigError("--k is too large", expected="<= 8", got=0, remedy="a smaller --k")
    assert str(error) == (
        "--k is too large\n  expected: <= 8\n  got:      0\n  remedy:   a smaller --k"
    )


def test_what_an_error_does_not_know_it_leaves_out() -> None:
    assert str(ConfigError("no", remedy="yes")) == "no\n  remedy:   yes"


def test_every_kind_of_error_has_an_exit_code_of_its_own() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, ActcacheError)
    ]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes) > 8
    assert all(0 < code < 126 for code in codes)


def test_what_stood_in_a_damaged_file_is_quoted_in_part() -> None:
    error = FormatError("x" * 10**6, expected="y" * 10**6, got="z" * 10**6)
    assert 10_000 < len(str(error)) < 20_000
