"""The programs as a whole: help, exit codes, errors without tracebacks."""

import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from actcache_cli.programs import actcache_app, saetrain_app

PROGRAM = """
import sys
from actcache_cli import main
sys.argv = {argv!r}
try:
    getattr(main, {program!r})()
except SystemExit:
    pass
heavy = {{"torch", "transformers", "numpy", "datasets", "triton", "wandb"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("actcache", []),
        ("actcache", ["harvest"]),
        ("actcache", ["hookpoints"]),
        ("actcache", ["inspect"]),
        ("actcache", ["plan"]),
        ("actcache", ["verify"]),
        ("saetrain", []),
        ("saetrain", ["fit"]),
        ("saetrain", ["eval"]),
    ],
)
def test_help_imports_nothing_heavy(program, command):
    code = PROGRAM.format(argv=[program, *command, "--help"], program=program)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("app", [actcache_app, saetrain_app])
def test_both_programs_print_their_version(app):
    result = CliRunner().invoke(app(), ["--version"])
    assert result.exit_code == 0
    assert result.stdout.strip() == version("actcache")


@pytest.mark.parametrize(
    ("app", "arguments", "code", "fragments"),
    [
        (actcache_app, ["inspect", "/nowhere"], 9, ["/nowhere is not a cache", "remedy"]),
        (actcache_app, ["harvest", "m", "d", "--out", "o", "--ctx-len", "1"], 2, ["--ctx-len"]),
        (actcache_app, ["harvest", "m", "d.txt", "--out", "o"], 3, ["no such file", "d.txt"]),
        (actcache_app, ["plan", "m", "d.txt"], 3, ["no such file", "d.txt"]),
        (actcache_app, ["plan", "m", "d", "--weight", "1"], 2, ["--weight", "--mix"]),
        (saetrain_app, ["fit", "/nowhere", "--out", "o"], 9, ["/nowhere is not a cache"]),
        (saetrain_app, ["fit", "/nowhere", "--out", "o", "--lr", "-1"], 2, ["--lr", "1e-30 to"]),
        (saetrain_app, ["eval", "/nowhere"], 11, ["/nowhere is not a run"]),
    ],
)
def test_invalid_input_is_reported_on_stderr_and_by_the_exit_code(
    app, arguments, code, fragments, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app(), arguments)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert all(fragment in result.stderr for fragment in fragments)
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


STARTING = """
import sys, time, types
from actcache_cli import main

def building():
    print("ready", flush=True)
    time.sleep(60)

sys.modules["actcache_cli.programs"] = types.SimpleNamespace(saetrain_app=building)
main.saetrain()
"""
ENDING = """
import atexit, sys, time, types
from actcache_cli import main

@atexit.register
def end():
    print("ready", flush=True)
    time.sleep(60)

sys.modules["actcache_cli.programs"] = types.SimpleNamespace(saetrain_app=lambda: lambda: None)
main.saetrain()
"""


@pytest.mark.parametrize(
    ("code", "number", "message"),
    [
        (STARTING, signal.SIGINT, "interrupted before the start\n"),
        (STARTING, signal.SIGTERM, "terminated before the start\n"),
        (ENDING, signal.SIGTERM, "terminated after the end\n"),
    ],
)
def test_a_signal_before_the_command_is_reached_ends_it_with_a_sentence(code, number, message):
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    _, errors = child.communicate(timeout=30)
    assert (child.returncode, errors) == (128 + number, message)


def test_a_program_that_was_started_to_ignore_ctrl_c_still_does():
    code = "import signal; signal.signal(2, signal.SIG_IGN)\n" + STARTING.replace("60", "0")
    code = code.replace("print(", "signal.raise_signal(2); print(")
    code = code.replace("time.sleep(0)", "return lambda: None")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")


def test_the_entry_of_the_programs_imports_the_standard_library_only():
    code = "import sys; from actcache_cli import main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = set(done.stdout.split())
    assert not {"typer", "click", "actcache", "inspect", "dataclasses"} & names


FAILING_LOG = """
import logging
from actcache_cli import main

def build():
    logging.getLogger("library").addHandler(logging.FileHandler("/dev/full"))
    return lambda: logging.getLogger("library").warning("a line that finds no room")

main._run(build)
"""


def test_a_log_of_a_library_that_cannot_be_written_prints_no_traceback():
    done = subprocess.run(
        [sys.executable, "-c", FAILING_LOG], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0
