from __future__ import annotations

import errno
from typing import Any

import pytest

from actcache import errors
from actcache.config import HarvestConfig
from actcache.data.datasets import open_dataset
from actcache.errors import (
    ActcacheError,
    ConfigError,
    DiskFullError,
    FormatError,
    shortage_of,
)
from actcache.model.loading import load_config

SHORTAGES: list[Exception] = [
    MemoryError("malloc of size 640 failed"),
    RuntimeError("can't start new thread"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("I/O error: Too many open files (os error 24)"),
]


def test_the_message_contains_what_expected_got_and_remedy() -> None:
    error = ConfigError("--k is too large", expected="<= 8", got=0, remedy="a smaller --k")
    assert str(error) == (
        "--k is too large\n  expected: <= 8\n  got:      0\n  remedy:   a smaller --k"
    )


def test_missing_fields_are_omitted_from_the_message() -> None:
    assert str(ConfigError("no", remedy="yes")) == "no\n  remedy:   yes"


def test_every_error_class_has_an_exit_code_of_its_own_or_of_its_kind() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, ActcacheError) and "exit_code" in vars(kind)
    ]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes) > 8
    assert all(0 < code < 126 for code in codes)


def test_a_value_that_python_does_not_show_is_described_by_its_type() -> None:
    error = ConfigError("--k is too large", got=10**5000)
    assert error.got == "a value of type int that is too long to show"


def test_long_values_are_cut_in_the_message() -> None:
    error = FormatError("x" * 10**6, expected="y" * 10**6, got="z" * 10**6)
    assert 10_000 < len(str(error)) < 20_000


@pytest.mark.parametrize("error", SHORTAGES)
def test_a_shortage_is_not_taken_for_a_bad_model_or_dataset(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("cannot read the file") from error

    monkeypatch.setattr("datasets.load_dataset_builder", fail)
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", fail)
    config = HarvestConfig("name", "name", "out")
    for load in (open_dataset, load_config):
        with pytest.raises((MemoryError, OSError, RuntimeError, DiskFullError)) as caught:
            load(config)
        assert type(caught.value) in (MemoryError, OSError, DiskFullError, type(error))
        assert str(error) in str(caught.value)


def test_other_failures_of_libraries_are_no_shortage() -> None:
    assert shortage_of(ValueError("int too big to convert")) is None
    assert shortage_of(OSError(errno.ENOENT, "No such file or directory")) is None


def test_a_name_with_a_line_end_forges_no_line_of_a_message() -> None:
    forged = "a\nerror: none\n  remedy:   delete it\tx"
    text = str(FormatError(f"{forged} is damaged", expected=forged, got=forged, remedy="none"))
    assert text.count("error: none") == 3
    assert [line for line in text.splitlines() if line.startswith(("error", "  remedy"))] == [
        "  remedy:   none"
    ]
    assert text.startswith(r"a\nerror: none\n")
