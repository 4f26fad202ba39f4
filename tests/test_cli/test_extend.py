"""`actcache harvest --extend`, and runs trained on a cache that is then extended."""

import json

import pytest
from typer.testing import CliRunner

from actcache.cache.reader import Cache
from actcache_cli.programs import actcache_app, saetrain_app


def run(app, *arguments, code=0):
    result = CliRunner().invoke(app(), [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def harvest(tiny_model, prose_file, cache):
    """Run a harvest of the given number of sequences, with further options."""
    command = ["harvest", tiny_model, prose_file, "--out", cache, "--ctx-len", 16]
    command += ["--batch-size", 2, "--shard-size", 4, "--hookpoint", "layers.1"]

    def make(sequences, *options, code=0):
        goal = [] if sequences is None else ["--max-tokens", 16 * sequences]
        return run(actcache_app, *command, *goal, *options, code=code)

    return make


def test_extend_continues_a_finished_harvest(harvest, cache):
    assert "wrote 3 shards" in harvest(10).stdout
    refused = harvest(30, code=7)
    assert "planned_sequences: 10, not 30" in refused.stderr
    assert "or add --extend, to continue with more tokens" in refused.stderr
    extended = harvest(30, "--extend")
    assert "wrote 5 shards, 300 rows" in extended.stdout
    assert "; complete, 450 rows in 8 shards" in extended.stdout
    assert extended.stderr == ""
    assert "nothing left to do; complete" in harvest(30, "--extend").stdout
    shown = run(actcache_app, "inspect", cache).stdout
    assert "complete (goal reached); extended after 160 tokens" in shown
    assert "sound; every byte" in run(actcache_app, "verify", cache).stdout


def test_extending_an_exhausted_text_prints_a_warning(harvest, cache, tree):
    harvest(None)
    before = tree(cache)
    for goal in (None, 100_000):
        result = harvest(goal, "--extend")
        assert "warning: --extend: the text has " in result.stderr
        assert "nothing left to do; complete" in result.stdout
    assert tree(cache) == before


def test_extending_a_cache_does_not_change_existing_runs(harvest, cache, tmp_path):
    harvest(50)
    fit = ["fit", cache, "--expansion-factor", 2, "--k", 4, "--batch-size", 32]
    fit += ["--val-fraction", 0.2, "--out"]
    run(saetrain_app, *fit, tmp_path / "old")
    before = run(saetrain_app, "eval", tmp_path / "old", "--json").stdout
    harvest(90, "--extend")
    assert run(saetrain_app, "eval", tmp_path / "old", "--json").stdout == before
    assert "nothing left to do" in run(saetrain_app, *fit, tmp_path / "old", "--resume").stdout
    run(saetrain_app, *fit, tmp_path / "new")
    old, new = (
        set(json.loads((tmp_path / name / "run.json").read_text())["held_out"])
        for name in ("old", "new")
    )
    # The split depends on the shard number: existing shards keep their side.
    assert old == {shard for shard in new if shard < 13}
    assert len(Cache.open(cache).shards) == 23
    assert len(new) > len(old)


def test_repair_of_an_extended_cache_needs_the_last_harvest_command(harvest, cache, tree):
    harvest(10)
    harvest(30, "--extend")
    before = tree(cache)
    for shard in (2, 6):
        path = cache / f"activations/layers.1/{shard:05d}.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    run(actcache_app, "verify", cache, "--repair", code=8)
    assert "wrote 2 shards" in harvest(30).stdout
    assert tree(cache) == before
