"""Tokens of processes, and detection of their end."""

from __future__ import annotations

import signal
import subprocess
import sys

from saetrain.distributed.process_group import has_exited, is_suspended, process_token

PRINT = """
from saetrain.distributed.process_group import process_token as n
print(n(), flush=True)
input()
"""


def test_a_process_has_exited_once_it_is_killed() -> None:
    assert not has_exited(process_token())
    child = subprocess.Popen(
        [sys.executable, "-c", PRINT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    token = child.stdout.readline().strip()
    assert not has_exited(token)
    assert not is_suspended(token)
    child.send_signal(signal.SIGSTOP)
    while not is_suspended(token):
        pass
    assert not has_exited(token)
    child.send_signal(signal.SIGKILL)
    child.stdout.read()  # at end of file the process is a zombie
    while not has_exited(token):
        pass
    child.communicate()
    assert has_exited(token)


def test_another_process_with_the_same_id_does_not_count() -> None:
    *same, _ = process_token().split(" ")
    assert has_exited(" ".join([*same, "12"]))


def test_a_process_of_another_machine_is_never_reported_as_exited() -> None:
    _, *rest = process_token().split(" ")
    assert not has_exited(" ".join(["elsewhere", *rest[:-1], "12"]))
