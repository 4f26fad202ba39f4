"""An S3 server behind a proxy that drops, delays and refuses connections."""

from __future__ import annotations

import itertools
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from actcache.adapters import CacheDataset, open_feed
from actcache.cache.reader import Cache
from actcache.cache.verify import verify
from actcache.errors import ActcacheError, ConfigError, EmptyCacheError, RemoteError
from actcache.filesystem import object_store
from actcache.filesystem.object_store import ObjectStore
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.order import make_plan
from actcache.stream.verified_reads import ReadSettings
from actcache_cli.programs import actcache_app, saetrain_app

PROGRAMS = {"actcache": actcache_app, "saetrain": saetrain_app}
Make = Callable[..., tuple[Path, str]]


def batches(cache: Cache) -> list[bytes]:
    """All batches of one epoch, as bytes."""
    shards = [(shard, receipt.rows) for shard, receipt in cache.receipts.items()]
    plan = make_plan(shards, cache.manifest.block_rows, 64, 0, 128)
    with ActivationStream(cache, cache.hookpoints, plan, reading=ReadSettings(4)) as stream:
        taken = itertools.islice(stream, plan.steps_per_epoch)
        return [b"".join(x.numpy().tobytes() for x in b.activations.values()) for b in taken]


def test_a_stream_from_s3_equals_that_of_the_folder_despite_dropped_connections(
    in_s3: Make, proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, url = in_s3()
    monkeypatch.setattr(
        object_store, "ATTEMPTS", 30
    )  # the proxy drops more connections than any network
    proxy.cuts = [150_000, 0, 60_000, 100, 90_000, 5_000]
    assert batches(Cache.open(url)) == batches(Cache.open(root))
    assert proxy.cut >= 5
    proxy.cuts = [None]
    assert verify(url).is_sound


def test_an_outage_raises_remote_error_and_cached_blocks_are_kept(in_s3: Make, proxy: Any) -> None:
    _, url = in_s3()
    cache = Cache.open(url)
    rows = cache.read("layers.0", 0)
    shards = [(shard, receipt.rows) for shard, receipt in cache.receipts.items()]
    plan = make_plan(shards, cache.manifest.block_rows, 64, 0, 128)
    proxy.down()
    np.testing.assert_array_equal(cache.read("layers.0", 0).values, rows.values)
    with (
        ActivationStream(cache, ["layers.1"], plan) as stream,
        pytest.raises(RemoteError, match="cannot be read") as caught,
    ):
        next(stream)
    assert caught.value.exit_code == 13
    for part in (url, "response within 8 attempts", "got:", "run the same command again"):
        assert part in str(caught.value)


def test_a_silent_store_runs_into_the_timeout(
    in_s3: Make, proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = in_s3()
    proxy.silent = True
    monkeypatch.setattr(object_store, "TIME_LIMIT", 0.1)
    with pytest.raises(RemoteError, match="cannot be read") as caught:
        Cache.open(url)
    assert "FSTimeoutError" in str(caught.value)  # our limit, not the store's library's


def test_a_wait_for_a_store_is_reported_in_one_line_for_all_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(object_store, "FIRST_NOTICE", 0.05)
    store = ObjectStore("memory://bucket/cache")
    store._with_retries(lambda: None, "quick")
    go_on = threading.Event()
    waits = [
        threading.Thread(target=store._with_retries, args=(go_on.wait, f"shards/{n}.json"))
        for n in range(4)
    ]
    for wait in waits:
        wait.start()
    time.sleep(0.5)
    go_on.set()
    for wait in waits:
        wait.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"waiting for memory://bucket/cache/shards/\d\.json since 0 s", line)


def test_forked_and_spawned_processes_read_the_same_cache(in_s3: Make) -> None:
    _, url = in_s3()
    feed = open_feed(url, "layers.0", batch_size=32, seed=0, val_fraction=0.25)
    loader = DataLoader(CacheDataset(feed), batch_size=None, num_workers=2)
    rows = next(iter(loader))
    assert torch.isfinite(rows).all()
    cache = Cache.open(url, block_cache_bytes=0)
    expected = cache.read("layers.0", 1).values
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(cache)).read("layers.0", 1).values, expected
    )


def test_a_missing_bucket_and_missing_credentials_are_reported(
    proxy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(EmptyCacheError, match="s3://no-such-bucket/cache is not a cache"):
        Cache.open("s3://no-such-bucket/cache")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(RemoteError, match="no credentials"):
        Cache.open("s3://no-such-bucket/cache")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("quux://bucket/cache", "fsspec does not support quux"),
        ("s3://", "not the URL of a cache"),
        ("memory://a/../b", "not the URL of a cache"),
        ("file:///some/cache", "given by its path"),
        ("simplecache::s3://bucket/cache", "chained"),
        ("https://host/cache?X-Signature=very-secret-indeed", "from a web server"),
        ("http://host/cache", "from a web server"),
        ("ftp://me:very-secret-indeed@host/cache", "may be a secret"),
    ],
)
def test_errors_about_invalid_urls_show_no_secrets(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Cache.open(url)
    assert "very-secret-indeed" not in str(caught.value)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec  # whose attribute `registry` hides the module of that name

    assert fsspec.registry is not sys.modules["fsspec.registry"]
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"pip install 'actcache\[s3\]'"):
        Cache.open("s3://bucket/cache")


def test_errors_of_libraries_are_shown_without_secrets(
    proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_store._secrets.cache_clear()
    store = object_store.ObjectStore("memory://a/b")

    def call(*_: object, **__: object) -> None:
        raise OSError("signed with very-secret-indeed")

    monkeypatch.setattr(store, "_call", call)
    with pytest.raises(ActcacheError) as caught:
        store.listing("")
    assert "very-secret-indeed" not in str(caught.value)
    assert "signed with ***" in str(caught.value)


def test_commands_that_only_read_accept_a_url(in_s3: Make, tmp_path: Path) -> None:
    root, url = in_s3(shards=6)

    def run(program: str, *arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(PROGRAMS[program](), arguments)
        assert done.exit_code == code, done.output
        return done.output

    page = tmp_path / "page.html"
    run("actcache", "inspect", url, "--html", str(page))
    assert "layers.1" in page.read_text()
    assert "layers.0 norms" in run("actcache", "inspect", url, "--text", "--sequences", "1")
    assert "from the store" in run("actcache", "bench", url)
    assert "cannot be a URL" in run("actcache", "verify", url, "--repair", code=2)
    fitted = []
    options = ["--batch-size", "64", "--num-latents", "32", "--k", "4", "--val-fraction", "0.2"]
    for number, cache in enumerate((str(root), url)):
        out = str(tmp_path / str(number))
        output = run("saetrain", "fit", cache, "--out", out, *options)
        run("saetrain", "eval", out)
        results = ("layers.0/sae.safetensors", "metrics.jsonl")
        fitted.append([Path(out, name).read_bytes() for name in results])
    assert "from a store" in output
    assert fitted[0] == fitted[1]
    assert f'"cache": "{url}"' in Path(out, "run.json").read_text()
    assert "nothing left to do" in run(
        "saetrain", "fit", url, "--out", out, *options, "--resume", "--block-cache-bytes", "0"
    )
    assert "cannot be a URL" in run("saetrain", "fit", url, "--out", out, "--follow", code=2)
    assert "cannot be a URL" in run("actcache", "convert", str(root), "--out", url, code=2)
    assert "cannot be a URL" in run("actcache", "harvest", "m", "d", "--out", url, code=2)


def test_the_installed_program_inspects_a_cache_in_s3_and_prints_errors_without_a_traceback(
    in_s3: Make,
) -> None:
    _, url = in_s3()
    program = str(Path(sys.executable).with_name("actcache"))
    for where, code, text in ((url, 0, f"cache    {url}"), (url + "/nowhere", 9, "not a cache")):
        done = subprocess.run([program, "inspect", where], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert text in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert "unclosed" not in done.stderr.lower()
