"""Whether a process is there."""

from __future__ import annotations

import signal
import subprocess
import sys

from saetrain.distributed.process_group import has_exited, process_token

TELL = """
from saetrain.distributed.process_group import process_token as n
print(n(), flush=True)
input()
"""


def test_a_process_is_there_until_it_is_killed() -> None:
    assert not has_exited(process_token())
    child = subprocess.Popen(
        [sys.executable, "-c", TELL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    assert not has_exited(name)
    child.send_signal(signal.SIGKILL)
    child.stdout.read()  # at its end, the process is dead, though nobody has waited for it
    while not has_exited(name):
        pass
    child.communicate()
    assert has_exited(name)


def test_another_process_of_the_same_number_is_not_taken_for_it() -> None:
    *same, _ = process_token().split(" ")
    assert has_exited(" ".join([*same, "12"]))


def test_of_another_machine_nothing_is_known() -> None:
    _, *rest = process_token().split(" ")
    assert not has_exited(" ".join(["elsewhere", *rest[:-1], "12"]))
