"""Whether a process is there."""

from __future__ import annotations

import signal
import subprocess
import sys

from saetrain.distributed.process_group import is_gone, name_of_this_process

TELL = """
from saetrain.distributed.process_group import name_of_this_process as n
print(n(), flush=True)
input()
"""


def test_a_process_is_there_until_it_is_killed() -> None:
    assert not is_gone(name_of_this_process())
    child = subprocess.Popen(
        [sys.executable, "-c", TELL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    assert not is_gone(name)
    child.send_signal(signal.SIGKILL)
    child.stdout.read()  # at its end, the process is dead, though nobody has waited for it
    while not is_gone(name):
        pass
    child.communicate()
    assert is_gone(name)


def test_another_process_of_the_same_number_is_not_taken_for_it() -> None:
    *same, _ = name_of_this_process().split(" ")
    assert is_gone(" ".join([*same, "12"]))


def test_of_another_machine_nothing_is_known() -> None:
    _, *rest = name_of_this_process().split(" ")
    assert not is_gone(" ".join(["elsewhere", *rest[:-1], "12"]))
