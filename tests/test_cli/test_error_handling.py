"""What stands between a command and the user."""

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


def test_every_kind_of_error_has_an_exit_code_of_its_own():
    kinds = errors.ActcacheError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes


@pytest.mark.parametrize("kind", errors.ActcacheError.__subclasses__())
def test_an_error_of_ours_is_printed_whole_and_exits_with_its_code(kind, capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(kind("this is wrong", expected=1, got=2, remedy="do that"))()
    assert exit_.value.exit_code == kind.exit_code
    told = capsys.readouterr().err
    for part in ("error: this is wrong", "expected: 1", "got:      2", "remedy:   do that"):
        assert part in told


def test_an_operating_system_error_names_the_file(capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(PermissionError(errno.EACCES, "Permission denied", "/some/file"))()
    assert exit_.value.exit_code == 1
    assert capsys.readouterr().err == "error: Permission denied: /some/file\n"


def test_an_interruption_says_how_to_go_on(capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(KeyboardInterrupt())()
    assert exit_.value.exit_code == INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(AssertionError):
        raiser(AssertionError("a bug"))()


def test_emit_prints_one_json_document(capsys):
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
def test_running_out_of_memory_is_told_with_a_remedy(error, capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(error)()
    assert exit_.value.exit_code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory")
    assert "--batch-size" in told


def test_emit_has_null_for_what_json_has_no_number_for(capsys):
    print_json({"a": (float("nan"), 1.0), "b": {"c": float("-inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0], "b": {"c": None}}
