"""Commands in processes of their own that begin after the imports, which take seconds.

`python fork_server.py` imports what the commands need, and forks a process for each request that
comes through the socket at its standard input. `ForkServer` starts it and sends the requests;
`Command` offers what tests use of `subprocess.Popen`. A command is `actcache` or `saetrain` with
its arguments, or a Python script. As in a new process, signals have their default handlers, and a
normal exit runs `atexit`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMPORTED = (
    "actcache.harvester.run",
    "saetrain.launch.run",
    "datasets",
    "pydantic",
    "torch.distributed.elastic.multiprocessing.errors",
    "transformers.models.llama.modeling_llama",
    "typer",
    "zarr",
)
"""Modules that the commands import."""

PROGRAMS = ("actcache", "saetrain")
BYTES = 1 << 20  # of a request: arguments and environment
SECONDS = 240  # timeout of a command that hangs


class ForkServer:
    """Starts the server with the first command."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket

    def start(self, *words: object, env: Mapping[str, str] | None = None) -> Command:
        """Start a command in the working directory.

        Args:
            words: `actcache`, `saetrain` or the path of a Python script, and its arguments.
            env: more environment variables.
        """
        if self._server is None:
            line = [sys.executable, "-P", __file__]
            self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._server = subprocess.Popen(line, stdin=theirs, stdout=subprocess.PIPE)
            assert self._server.stdout is not None
            assert self._server.stdout.readline() == b"ready\n"
        request = {
            "words": [str(word) for word in words],
            "env": os.environ | dict(env or {}),
            "folder": str(Path.cwd()),
        }
        return Command(self._requests, json.dumps(request).encode())

    def start_ranks(self, count: int, *words: object) -> list[Command]:
        """Start a command as that many ranks of one machine, as torchrun does."""
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
        }
        ranks = [
            self.start(*words, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]
        for rank in ranks:
            rank.store = store  # held until the last has ended
        return ranks

    def close(self) -> None:
        if self._server is not None:
            self._requests.close()
            self._server.communicate()


class Command:
    """A running or ended command."""

    def __init__(self, requests: socket.socket, request: bytes) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self._connection, theirs = socket.socketpair()
        descriptors = [file.fileno() for file in (*self._files, theirs)]
        socket.send_fds(requests, [request], descriptors)
        theirs.close()
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None
        self.stdout = self.stderr = ""
        self.store: object = None

    def poll(self) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._connection, selectors.EVENT_READ)
                if ready.select(0):
                    self._end()
        return self.returncode

    def wait(self, timeout: float = SECONDS) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.002)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = SECONDS) -> tuple[str, str]:
        """Wait for the end, and return what was printed on stdout and on stderr."""
        self.wait(timeout)
        return self.stdout, self.stderr

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _end(self) -> None:
        self.returncode = int(self._answers.readline())
        self._answers.close()
        self._connection.close()
        for file in self._files:
            file.seek(0)
        self.stdout, self.stderr = (file.read().decode() for file in self._files)
        for file in self._files:
            file.close()
        self.store = None


# --- the server ----------------------------------------------------------------------------------


def serve(requests: socket.socket) -> dict[str, Any]:
    """Fork a process for each request; return the request in that process."""
    for name in IMPORTED:
        importlib.import_module(name)
    print("ready", flush=True)
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, BYTES, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0 and supervise(*descriptors):
            requests.close()
            request: dict[str, Any] = json.loads(message)
            return request
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):  # there are none
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def supervise(stdout: int, stderr: int, answers: int) -> bool:
    """Fork the process of a request and return there; send its id and exit code."""
    command = os.fork()
    if command == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for descriptor in (stdout, stderr, answers):
            os.close(descriptor)
        return True
    os.write(answers, f"{command}\n".encode())
    _, status = os.waitpid(command, 0)
    os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def run(words: list[str], env: dict[str, str], folder: str) -> None:
    """Do what the command does, in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ |= env
    os.chdir(folder)
    sys.argv = words
    if words[0] in PROGRAMS:
        getattr(importlib.import_module("actcache_cli.main"), words[0])()
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    with warnings.catch_warnings():  # imports have started threads, of which the copies have none
        warnings.simplefilter("ignore", DeprecationWarning)
        asked = serve(socket.socket(fileno=os.dup(0)))
    run(**asked)
