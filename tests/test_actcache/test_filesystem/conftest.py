"""Caches in a store (in memory, and behind a local server that speaks S3), and a rooted folder."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from actcache.filesystem import object_store
from actcache.filesystem.rooted import rooted


def upload(root: Path, url: str, **options: Any) -> str:
    """Copy a cache to a URL and return the URL."""
    import fsspec

    fs, base = fsspec.core.url_to_fs(url, **options)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{base}/{path.relative_to(root)}", path.read_bytes())
    return url


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of a new, empty in-memory folder."""
    import fsspec

    url = f"memory://{uuid.uuid4().hex}/cache"
    yield url
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(autouse=True)
def own_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set a block cache for this test, and short delays between attempts."""
    folder = tmp_path / "blocks"
    monkeypatch.setenv("ACTCACHE_BLOCK_CACHE", str(folder))
    monkeypatch.setattr(object_store, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(object_store, "MOST_DELAY", 0.02)
    return folder


@pytest.fixture
def in_memory(make_cache: Callable[..., Path], memory: str) -> Callable[..., tuple[Path, str]]:
    """Create a cache and an in-memory copy of it."""

    def make(**options: Any) -> tuple[Path, str]:
        root = make_cache(**options)
        return root, upload(root, memory)

    return make


SERVER = """
import logging, time
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").disabled = True
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of an S3 server (moto)."""
    pytest.importorskip("moto")
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield int(process.stdout.readline())
    process.kill()
    process.communicate()


class Proxy:
    """TCP proxy that injects faults.

    Connection n forwards `cuts[n % len(cuts)]` bytes of responses before it is closed; None
    forwards all.
    """

    def __init__(self, port: int) -> None:
        self._to, self.cuts, self.connections, self.cut = port, [None], 0, 0
        self.silent = False
        self._open: list[socket.socket] = []
        self._listen(0)

    def _listen(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def down(self) -> None:
        """Refuse all further connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open = []

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            cut = self.cuts[self.connections % len(self.cuts)]
            self.connections += 1
            server = socket.create_connection(("127.0.0.1", self._to))
            self._open += [client, server]
            for a, b, most in ((client, server, None), (server, client, cut)):
                threading.Thread(target=self._relay, args=[a, b, most], daemon=True).start()

    def _relay(self, source: socket.socket, to: socket.socket, most: int | None) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                if self.silent:
                    continue
                if most is not None and len(data) >= most:
                    self.cut += 1
                    to.sendall(data[:most])
                    break
                most = None if most is None else most - len(data)
                to.sendall(data)
        for each in (source, to):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Proxy to the S3 server, set as the endpoint of s3://, with a bucket named `bucket`."""
    found = Proxy(s3_port)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{found.port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "very-secret-indeed",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
    yield found
    found.down()


@pytest.fixture
def in_s3(make_cache: Callable[..., Path], s3_port: int, proxy: Proxy) -> Callable[..., Any]:
    """Create a cache and a copy of it in the S3 bucket."""

    def make(**options: Any) -> tuple[Path, str]:
        import fsspec

        direct = {"endpoint_url": f"http://127.0.0.1:{s3_port}"}
        fs = fsspec.filesystem("s3", **direct)
        bucket = f"bucket-{uuid.uuid4().hex}"
        fs.mkdir(bucket)
        root = make_cache(**options)
        return root, upload(root, f"s3://{bucket}/some/cache", **direct)

    return make


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the file a/b, behind a link, beside the file victim."""
    (tmp_path / "real" / "a").mkdir(parents=True)
    (tmp_path / "real" / "a" / "b").write_bytes(b"inside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b").write_bytes(b"precious")
    (tmp_path / "root").symlink_to("real")
    return rooted(tmp_path / "root")
