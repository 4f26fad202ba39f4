"""Error messages, exit codes and JSON output of the commands."""

import errno
import json
import os
import threading

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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_a_quota_and_a_limit_of_file_size_have_the_code_of_a_full_disk(number, capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(OSError(number, "no room", "/some/file"))()
    assert exit_.value.exit_code == errors.DiskFullError.exit_code
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: no room: /some/file\n  remedy: ")


@pytest.mark.parametrize(
    "number", [errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.EMFILE]
)
def test_a_file_system_that_is_gone_or_read_only_is_a_sentence_with_a_remedy(number, capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(OSError(number, os.strerror(number), "/some/file"))()
    assert exit_.value.exit_code == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: {os.strerror(number)}: /some/file\n  remedy: ")


@pytest.mark.parametrize("name", ["DistStoreError", "DistNetworkError"])
def test_a_store_that_is_gone_is_a_sentence(name, capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(type(name, (RuntimeError,), {})("Connection reset by peer"))()
    assert exit_.value.exit_code == errors.RunError.exit_code
    assert "Connection reset by peer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        RecursionError(),
        RuntimeError("can't start new thread"),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
        ValueError("embedded null byte"),
    ],
)
def test_deep_values_impossible_names_and_a_limit_of_threads_are_sentences(error, capsys):
    with pytest.raises(typer.Exit):
        raiser(error)()
    assert "remedy" in capsys.readouterr().err


def test_a_pipe_that_breaks_elsewhere_than_behind_stdout_is_not_silent(capsys):
    with pytest.raises(typer.Exit):
        raiser(BrokenPipeError(errno.EPIPE, "Broken pipe"))()
    assert capsys.readouterr().err == "error: Broken pipe\n"


def test_errors_and_results_are_escaped(capsys):
    @report_errors
    def run():
        print("\x1b[2Jresult")
        raise errors.FormatError("\x1b]0;title\x07", got="\u202e")

    with pytest.raises(typer.Exit):
        run()
    assert capsys.readouterr() == (
        "\\x1b[2Jresult\n",
        "error: \\x1b]0;title\\x07\n  got:      \\u202e\n",
    )


def test_an_interrupt_prints_how_to_resume(capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(KeyboardInterrupt())()
    assert exit_.value.exit_code == INTERRUPTED
    assert "the same command resumes" in capsys.readouterr().err


def test_an_interrupt_that_openblas_sends_itself_is_a_lack_of_threads(monkeypatch, capsys):
    @report_errors
    def run():
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        raise KeyboardInterrupt

    def no_thread(_):
        raise RuntimeError("can't start new thread")

    with pytest.raises(typer.Exit) as exit_:
        run()
    assert exit_.value.exit_code == errors.ActcacheError.exit_code
    assert "error: the system allows no more threads" in capsys.readouterr().err


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
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"),
        RuntimeError("numel: integer multiplication overflow"),
        RuntimeError("Overflow when unpacking long long"),
        RuntimeError("std::bad_alloc"),
        OverflowError("Python int too large to convert to C long"),
        ValueError("array is too big; `arr.size * arr.dtype.itemsize` is larger than the maximum"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        ImportError("libtorch_cpu.so: cannot allocate memory"),
        SystemError("error return without exception set"),
        SystemError("<built-in function exec> returned NULL without setting an exception"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
        type("AcceleratorError", (RuntimeError,), {})("CUDA error: out of memory"),
    ],
)
def test_an_out_of_memory_error_is_printed_with_a_remedy(error, capsys):
    with pytest.raises(typer.Exit) as exit_:
        raiser(error)()
    assert exit_.value.exit_code == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: out of memory")
    assert f"got:      {str(error) or type(error).__name__}" in stderr
    assert "--batch-size" in stderr


def test_bytes_that_are_no_text_are_not_taken_for_a_name(capsys):
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    with pytest.raises(typer.Exit):
        raiser(error)()
    assert "error: a file or an input is not UTF-8 text" in capsys.readouterr().err
    with pytest.raises(typer.Exit):
        raiser(UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"))()
    assert "error: a name of a file or folder" in capsys.readouterr().err


def test_print_json_replaces_nan_and_infinities_by_null(capsys):
    print_json({"a": (float("nan"), 1.0), "b": {"c": float("-inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0], "b": {"c": None}}
