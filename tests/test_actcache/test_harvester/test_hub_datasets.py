"""Harvests of a dataset of the Hub, served on the loopback interface."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

PROGRAM = """
import dataclasses, shutil, sys, urllib.request
from pathlib import Path
from actcache import Cache, HarvestConfig, harvest
from actcache.errors import CacheMismatchError

model, out, endpoint, local = sys.argv[1:]
common = {"hookpoint": "layers.0", "ctx_len": 16, "max_tokens": 160, "shard_size": 4}

def make(**given):
    return harvest(HarvestConfig(model, "some/texts", out, **common, **given))

for streaming in (False, True):
    urllib.request.urlopen(endpoint + "/move/a").read()
    made = make(streaming=streaming)
    (Path(out) / "shards" / "END.json").unlink()
    (Path(out) / "shards" / "00001.json").unlink()
    urllib.request.urlopen(endpoint + "/move/b").read()
    try:
        make(streaming=streaming)
    except CacheMismatchError as error:
        print(error)
    again = make(streaming=streaming, dataset_revision="a" * 40)
    assert (again.cache_id, again.complete, again.new_shards) == (made.cache_id, True, 1)
    print(Cache.open(out).manifest.identity.dataset_commits)
    shutil.rmtree(out)

mixed = HarvestConfig(model, local, out, mix=("some/texts",), **common)
urllib.request.urlopen(endpoint + "/move/a").read()
made = harvest(mixed)
urllib.request.urlopen(endpoint + "/move/b").read()
try:
    harvest(mixed)
except CacheMismatchError as error:
    print(error)
again = harvest(dataclasses.replace(mixed, dataset_revision=("", "a" * 40)))
assert (again.cache_id, again.complete) == (made.cache_id, True)
"""


@contextlib.contextmanager
def hub(files: dict[str, bytes]) -> Iterator[str]:
    """Serve a dataset some/texts, whose branch main can be moved: /move/a is commit aa...a."""
    commits = {"main": "0" * 40}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body: object, code: int = 200, **headers: str) -> None:
            text = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(text)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(text)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[0] == "move":
                commits["main"] = parts[1] * 40
                self.answer(b"")
            elif parts[:1] == ["api"] and "tree" in parts:
                entries = [(name, len(data), oid(data)) for name, data in files.items()]
                self.answer(
                    [{"type": "file", "path": n, "size": s, "oid": o} for n, s, o in entries]
                )
            elif parts[:1] == ["api"]:
                sha = commits.get(parts[-1], parts[-1])
                siblings = [{"rfilename": name} for name in files]
                self.answer({"id": "some/texts", "sha": sha, "siblings": siblings, "tags": []})
            elif parts[-1] in files:
                commit = commits.get(parts[4], parts[4])
                data = files[parts[-1]]
                self.answer(data, ETag=f'"{oid(data)}"', X_Repo_Commit=commit)
            else:
                self.answer(b"", 404, X_Error_Code="EntryNotFound")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def test_a_commit_of_the_dataset_that_differs_is_refused_by_name(
    tiny_model: Path, prose_file: Path, tmp_path: Path
) -> None:
    files = {"README.md": b"---\nlicense: mit\n---\n", "data.jsonl": prose_file.read_bytes()}
    with hub(files) as endpoint:
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        command = [sys.executable, "-c", PROGRAM]
        command += [tiny_model, tmp_path / "cache", endpoint, prose_file]
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    refused = f"dataset commits: ('{'a' * 40}',), not ('{'b' * 40}',)"
    assert done.stdout.count(f"{refused} (--dataset-revision {'a' * 40})") == 2
    assert done.stdout.count(f"\n('{'a' * 40}',)\n") == 2
    assert f"(--dataset-revision '' --dataset-revision {'a' * 40})" in done.stdout
