"""`actcache inspect` as a user runs it."""

import dataclasses
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from typer.testing import CliRunner

from actcache.core.json_codec import to_json
from actcache.filesystem.atomic import digest_file
from actcache.format.manifest import read_manifest
from actcache.format.receipts import receipt_path
from actcache_cli.inspect.command import MODEL_NAME
from actcache_cli.programs import actcache_app

ACTCACHE = Path(sys.executable).with_name("actcache")


def run(*arguments, code=0, columns=100):
    runner = CliRunner(env={"COLUMNS": str(columns)})
    result = runner.invoke(actcache_app(), ["inspect", *(str(a) for a in arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def small(make_cache):
    return make_cache(shards=3)


@pytest.fixture(scope="module")
def deep(make_cache):
    """Cache with as many hookpoints as a large model has layers."""
    return make_cache(shards=2, sequences=2, hookpoints={f"layers.{i}": 8 for i in range(50)})


def bad_rows(hookpoint, shard, count, width):
    rows = np.random.RandomState(shard).standard_normal((count, width)).astype(np.float32)
    if hookpoint == "layers.0":
        rows[:shard, 0] = np.nan
        rows[shard : 2 * shard, 1] = -40_000
    return rows


@pytest.mark.parametrize("columns", [80, 100, 120, 200])
@pytest.mark.parametrize("which", ["small", "deep"])
@pytest.mark.parametrize("how", [[], ["--verbose"], ["--hookpoint", "layers.1"], ["--shard", 1]])
def test_no_line_is_longer_than_the_terminal(how, which, columns, request):
    shown = run(request.getfixturevalue(which), *how, columns=columns).stdout
    # The cache's path and names of files are never broken.
    lines = [line for line in shown.splitlines() if "/" not in line]
    assert max(map(len, lines)) <= columns


def test_the_default_output_is_short_and_has_all_facts(small):
    lines = run(small).stdout.splitlines()
    assert len(lines) < 30
    assert lines[0].startswith(f"cache    {small}")
    facts = {line[:9].strip(): line[9:] for line in lines}
    assert facts["state"] == "complete (goal reached)"
    assert facts["left out"] == "skip_positions 5.88% (24)"
    assert facts["numbers"] == "all finite, and none near float16's overflow"
    assert "speed" not in facts
    shown = "\n".join(lines)
    assert re.search(r"layers\.0 +16 .*[▁▂▃▄▅▆▇█]", shown)
    assert "largest dimensions" in shown
    assert re.search(r"layers\.0 \(1\) +1\.00", shown)


def test_many_hookpoints_are_summarised(deep):
    shown = run(deep).stdout
    assert len(shown.splitlines()) < 60
    assert "and 10 more hookpoints: --verbose, or --hookpoint NAME" in shown
    assert re.search(r"means +cosines from -?0\.\d\d \(layers", shown)
    assert "largest dimensions" not in shown
    every = run(deep, "--verbose").stdout
    assert every.count("median dimension's RMS") == 50
    assert "more hookpoints" not in every


def test_one_hookpoint_is_shown_in_detail(small):
    shown = run(small, "--hookpoint", "layers.1").stdout
    assert "layers.1: norms of 384 finite rows, median" in shown
    assert "│" in shown
    assert "over median" in shown
    assert re.search(r"cosine of mean rows with\n  layers\.0  -?0\.\d{3}", shown)
    assert "layers.7" in run(small, "--hookpoint", "layers.7", code=5).stderr


def test_one_shard_is_shown_with_its_files(small):
    shown = run(small, "--shard", 1).stdout
    assert "shard 1 holds sequences 8 to 15 of the harvest" in shown
    assert re.search(r"activations/layers\.0 +[\d,]+  there +[0-9a-f]{32}", shown)
    assert "136 tokens in 8 sequences, shard 1; 128 rows in float32" in shown
    assert "has no shard 9" in run(small, "--shard", 9, code=2).stderr


def test_shards_with_bad_rows_are_listed(make_cache):
    root = make_cache(shards=12, sequences=2, rows=bad_rows)
    shown = run(root, columns=120).stdout
    assert "66 non-finite rows, 66 near float16's overflow, in 11 of 12 shards" in shown
    assert re.search(r"shard +rows +non-finite +near overflow +where", shown)
    assert re.search(r"\n +11 +32 +11 +11 +layers\.0 22", shown)
    assert "and 3 more shards: --verbose" in shown
    assert re.search(r"hookpoint.*non-finite +near overflow", shown)
    assert "more shards" not in run(root, "--verbose").stdout


def test_speed_is_shown_by_rank(make_cache):
    root = make_cache(shards=4)
    (root / "logs").mkdir()
    for rank, seconds in [(0, 1.0), (1, 2.0)]:
        entries = [
            {"shard": shard, "seconds": seconds, "host": f"node{rank}"}
            for shard in range(rank, 4, 2)
        ]
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (root / "logs" / f"harvest-rank{rank}.jsonl").write_text(text)
    shown = run(root).stdout
    assert "speed    204 tokens/s" in shown
    assert "on 2 ranks together; slowest: rank 1" in shown
    assert re.search(r"\n +1 +68 .*node1\n", shown)
    (root / "logs" / "harvest-rank1.jsonl").write_text("{cut")
    assert "136 tokens/s" in run(root).stdout


def test_a_partial_cache_is_shown_as_incomplete(make_cache):
    root = make_cache(shards=4, end=False)
    receipt_path(root, 1).unlink()
    (root / "activations/layers.0/00002.safetensors").unlink()
    (root / "stats/00003.safetensors").unlink()
    shown = run(root, "--text", "--shard", 0).stdout
    assert "shard 0, sequence 7" in shown
    shown = run(root).stdout
    assert "incomplete: 1 of 4 shards are missing; 2 files are missing or cut" in shown
    assert "the statistics of 1 of 3 shards cannot be read" in shown
    assert "has no shard 1" in run(root, "--shard", 1, code=2).stderr


def test_a_cache_of_one_shard_is_shown(make_cache):
    root = make_cache(shards=1, sequences=1, hookpoints={"layers.0": 3})
    shown = run(root).stdout
    assert "17 tokens in 1 sequences, 1 shards" in shown
    assert "cosine" not in shown


def test_a_pipe_gets_only_the_first_sequences(small):
    shown = run(small, "--text", "--hookpoint", "layers.1").stdout
    assert shown.startswith("layers.1: median norm of the cache ")
    assert shown.count("layers.1 norms") == 8
    assert "and 16 more sequences: --sequences N" in shown
    assert "\x1b" not in shown
    everything = run(small, "--text", "--sequences", 24).stdout
    assert everything.count("layers.0 norms") == 24
    assert "more sequences" not in everything
    assert run(small, "--text", "--shard", 2).stdout.count("shard 2, sequence") == 8


def test_json_has_all_facts(small):
    shown = run(small, "--json", "--text", "--sequences", 1, "--sample", 1, "--shard", 1).stdout
    found = json.loads(shown)
    assert found["excluded"][0]["name"] == "skip_positions"
    assert found["afflictions"]["shards"] == 0
    assert found["speed"] == []
    assert found["shard"]["files"][0]["state"] == "there"
    assert found["samples"][0]["shard"] == 1
    (reading,) = found["readings"]
    assert [t["state"] for t in reading["tokens"]] == ["left out"] + ["kept"] * 16
    assert found["hookpoints"][0]["dimensions"]["largest"][0]["rms"] > 0
    assert json.loads(run(small, "--json").stdout)["readings"] == []


def test_html_writes_a_single_file(small, tmp_path):
    result = run(small, "--html", tmp_path / "page.html", "--sequences", 2)
    assert result.stdout == ""
    assert f"{tmp_path / 'page.html'}: one page" in result.stderr
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h3>Sequence ") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_names_in_a_manifest_are_escaped_and_cut(make_cache):
    root = make_cache(shards=1)
    assert MODEL_NAME.fullmatch("HuggingFaceTB/SmolLM2-135M")
    for name in ("../x", "/etc/x", "a/b/c", "a\n", ".x", "a/../b", ""):
        assert not MODEL_NAME.fullmatch(name)
    hostile = "\x1b]0;owned\x07\x1b[2J" + "A" * 10**6
    manifest = read_manifest(root)
    manifest = dataclasses.replace(manifest, model=hostile, dataset=hostile, split=hostile)
    (root / "manifest.json").write_bytes(to_json(manifest, sealed=True))
    result = run(root, "--text")
    assert "\x1b" not in result.output
    assert len(result.output) < 10_000
    assert len(run(root).output) < 10_000


def test_a_closed_pipe_ends_the_command_without_an_error(small):
    shown = subprocess.run(
        f"{ACTCACHE} inspect {small} --text --sequences 24 | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(shown.stdout.splitlines()) == 1
    assert "rror" not in shown.stderr


def test_on_a_terminal_a_pager_shows_every_sequence_in_colour(small, tmp_path):
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ncat > {tmp_path}/paged\n")
    pager.chmod(0o755)
    terminal, child = pty.openpty()
    command = [ACTCACHE, "inspect", small, "--text"]
    env = os.environ | {"PAGER": str(pager), "TERM": "xterm", "COLUMNS": "80"}
    env.pop("NO_COLOR", None)
    subprocess.run(command, stdin=child, stdout=child, stderr=child, env=env, check=True)
    paged = (tmp_path / "paged").read_text()
    assert paged.count("layers.0 norms") == 24
    env["NO_COLOR"] = "1"
    subprocess.run(command, stdin=child, stdout=child, stderr=child, env=env, check=True)
    assert "\x1b" not in (tmp_path / "paged").read_text()
    os.close(terminal)
    os.close(child)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e308, -1e308, 0.0, 5e-324])
def test_invalid_statistics_with_a_valid_digest_are_shown_without_a_crash(
    number, make_cache, tmp_path
):
    root = make_cache(shards=2)
    for shard in (0, 1):
        path = root / "stats" / f"{shard:05d}.safetensors"
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:begin] + np.float64(number).tobytes() * ((len(data) - begin) // 8))
        receipt = json.loads(receipt_path(root, shard).read_text())
        receipt["files"]["stats"] = dataclasses.asdict(digest_file(path))
        receipt_path(root, shard).write_bytes(to_json(receipt, sealed=True))
    for how in ([], ["--verbose"], ["--hookpoint", "layers.1"], ["--text"]):
        assert len(run(root, *how).stdout) < 50_000
    json.loads(run(root, "--json").stdout)
    run(root, "--html", tmp_path / "page.html")
    ET.fromstring((tmp_path / "page.html").read_text())


def test_sinks_are_described_in_a_sentence_in_json_and_on_the_page(sinks_path, tmp_path):
    said = (
        r"12 rows \(2\.34%\) above 10 median norms hold \d\d\.\d% of the variance of layers\.1 "
        r"\(\d at position \d+, .*\): --max-norm-ratio 10"
    )
    assert re.search(f"^{said}", run(sinks_path).stdout, re.MULTILINE)
    assert re.search(said, run(sinks_path, "--verbose").stdout)
    assert re.search(said, run(sinks_path, "--hookpoint", "layers.1").stdout)
    assert "max-norm-ratio" not in run(sinks_path, "--hookpoint", "layers.0").stdout
    (found,) = json.loads(run(sinks_path, "--json").stdout)["sinks"]
    assert (found["hookpoint"], found["sinks"], found["at_first_position"]) == ("layers.1", 12, 0)
    run(sinks_path, "--html", tmp_path / "page.html")
    assert re.search(said, (tmp_path / "page.html").read_text())
