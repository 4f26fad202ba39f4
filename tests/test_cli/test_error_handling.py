"""Error messages, exit codes and JSON output of the commands."""

import errno
import json

import pytest
import typer

from actcache import errors
from actcache_cli.error_handling import INTERRUPTED, print_json, report_errors


def raiser(error):
    @report_errors
    def run():
        raise error

    return run


def test_every_error_class_has_a_distinct_exit_code():
    kinds = errors.ActcacheError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes


@pytest.mark.parametrize("kind", errors.ActcacheError.__subclasses__())
def test_an_actcache_error_is_printed_in_full_and_exits_with_its_code(kind, capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(kind("this is wrong", expected=1, got=2, remedy="do that"))()
    assert exit_.value.exit_code == kind.exit_code
    stderr = capsys.readouterr().err
    for line in ("error: this is wrong", "expected: 1", "got:      2", "remedy:   do that"):
        assert line in stderr


def test_an_operating_system_error_names_the_file(capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(PermissionError(errno.EACCES, "Permission denied", "/some/file"))()
    assert exit_.value.exit_code == 1
    assert capsys.readouterr().err == "error: Permission denied: /some/file\n"


def test_an_interrupt_prints_how_to_resume(capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(KeyboardInterrupt())()
    assert exit_.value.exit_code == INTERRUPTED
    assert "the same command resumes" in capsys.readouterr().err


def test_an_unexpected_error_keeps_its_traceback():
    with pytest.raises(AssertionError):
        raiser(AssertionError("a bug"))()


def test_print_json_prints_one_document(capsys):
    print_json({"a": [1, 2.5, None]})
    assert capsys.readouterr().out == '{\n  "a": [\n    1,\n    2.5,\n    null\n  ]\n}\n'


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8 TiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
    ],
)
def test_an_out_of_memory_error_is_printed_with_a_remedy(error, capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(error)()
    assert exit_.value.exit_code == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: out of memory")
    assert "--batch-size" in stderr


def test_print_json_replaces_nan_and_infinities_by_null(capsys):
    print_json({"a": (float("nan"), 1.0), "b": {"c": float("-inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0], "b": {"c": None}}
