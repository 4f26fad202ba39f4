"""`actcache verify`."""

import errno
import itertools
import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from actcache.cache import repair, restore
from actcache.errors import DiskFullError
from actcache_cli.programs import actcache_app


def run(*arguments, code=0):
    result = CliRunner().invoke(actcache_app(), [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def harvest(tiny_model, prose_file):
    """The harvest command without --out."""
    command = [tiny_model, prose_file, "--ctx-len", 16, "--batch-size", 2, "--shard-size", 8]
    return [*command, "--max-tokens", 320, "--hookpoint", "layers.1"]


@pytest.fixture
def cache(harvest, tmp_path):
    run("harvest", *harvest, "--out", tmp_path / "cache")
    return tmp_path / "cache"


def damage(cache):
    path = cache / "activations/layers.1/00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:99] + bytes([data[99] ^ 4]) + data[100:])


def test_verify_of_a_sound_cache_prints_one_line(cache):
    (line,) = run("verify", cache).stdout.splitlines()
    assert line.startswith(f"{cache}: sound; every byte of 9 files in 3 shards, ")
    assert "sizes and headers of 9 files" in run("verify", cache, "--quick").stdout


def test_damage_is_printed_with_expected_and_got_and_gives_its_exit_code(cache):
    damage(cache)
    lines = run("verify", cache, "--threads", 2, code=8).stdout.splitlines()
    assert lines[0] == "activations/layers.1/00001.safetensors"
    assert lines[1].startswith("  expected: XXH3-128 ")
    assert lines[2].startswith("  got:      XXH3-128 ")
    assert lines[3].startswith(f"{cache}: 1 findings; ")
    assert run("verify", cache, "--quick").exit_code == 0


def test_the_name_of_a_file_forges_no_line_of_the_list(cache):
    (cache / "x\nforged: sound\ty").write_text("x")
    (cache / "shards" / "00007.json\nforged").write_text("x")
    lines = run("verify", cache).stdout.splitlines()
    assert not any(line.startswith("forged") for line in lines)
    assert any(r"x\nforged: sound\ty" in line for line in lines)


def test_verify_prints_json(cache):
    assert json.loads(run("verify", cache, "--json").stdout)["sound"]
    damage(cache)
    (cache / "notes").write_text("x")
    found = json.loads(run("verify", cache, "--json", code=8).stdout)
    assert not found["sound"]
    assert found["damages"][0]["shard"] == 1
    assert found["leftovers"] == ["notes"]


def test_repair_with_the_harvest_command_rewrites_damaged_shards(cache, harvest, tree):
    before = tree(cache)
    damage(cache)
    result = run("verify", cache, "--repair", "--", *harvest)
    assert "retracted shards 1; harvested 1 shards again" in result.stderr
    assert tree(cache) == before
    assert run("verify", cache, "--repair", "--", *harvest).stderr == ""


@pytest.mark.parametrize("wrong", ["model", "text", "goal", "shard size"])
def test_a_repair_with_another_command_retracts_nothing(
    wrong, cache, harvest, tree, make_model, tmp_path
):
    damage(cache)
    before = tree(cache)
    other = tmp_path / "other.txt"
    other.write_text("another text " * 300)
    model, text, *options = harvest
    command = {"model": [make_model(seed=9), text], "text": [model, other]}.get(wrong, harvest[:2])
    options += {"goal": ["--max-tokens", 640], "shard size": ["--shard-size", 4]}.get(wrong, [])
    stderr = run("verify", cache, "--repair", "--", *command, *options, code=7).stderr
    assert "nothing was done" in stderr
    run("verify", cache, "--repair", "--", "no-such-model", text, *options, code=4)
    assert tree(cache) == before


def test_a_failed_repair_leaves_the_cache_as_it_was(cache, harvest, tree, monkeypatch):
    damage(cache)
    before = tree(cache)

    def full(*_):
        raise DiskFullError("no room")

    monkeypatch.setattr("actcache.harvester.run.capture_shard", full)
    run("verify", cache, "--repair", "--", *harvest, code=10)
    assert tree(cache) == before


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("fifo", "shards/00002.json"),
        ("link", "tokens/00002.safetensors"),
        ("device", "manifest.json"),
    ],
)
def test_a_repair_beside_a_link_or_pipe_touches_nothing(kind, name, cache, harvest, tmp_path):
    path = cache / name
    kept = path.rename(tmp_path / "kept")
    if kind == "link":
        path.symlink_to(kept)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    (cache / "activations/layers.1/00000.safetensors").write_bytes(b"damaged")
    before = sorted(cache.rglob("*"))
    for command in (["--", *harvest], []):
        stderr = run("verify", cache, "--repair", *command, code=6).stderr
        assert str(path) in stderr
    assert sorted(cache.rglob("*")) == before
    path.unlink()
    kept.rename(path)
    run("verify", cache, "--repair", "--", *harvest)
    assert run("verify", cache).exit_code == 0


@pytest.mark.parametrize("receipt", ["sound", "damaged"])
def test_a_repair_does_not_read_a_file_that_is_too_large(
    receipt, cache, harvest, tree, monkeypatch
):
    before, read = tree(cache), []
    real = restore.digest_file
    monkeypatch.setattr(
        restore, "digest_file", lambda path, *_: read.append(path.stat().st_size) or real(path)
    )
    os.truncate(cache / "tokens/00001.safetensors", 1 << 32)
    if receipt == "damaged":
        (cache / "shards/00001.json").write_text("{")
    code = 15 if receipt == "damaged" else 0  # then nothing shows which bytes are right
    run("verify", cache, "--quick", "--repair", "--", *harvest, code=code)
    assert read
    assert max(read) < 1 << 20
    if not code:
        assert tree(cache) == before


@pytest.mark.parametrize("step", ["write_atomic", "fsync_dir"])
def test_shards_are_reinstated_if_retraction_fails_halfway(step, cache, harvest, tree, monkeypatch):
    damage(cache)
    (cache / "tokens/00002.safetensors").write_bytes(b"damaged")
    before = tree(cache)
    real, calls = getattr(repair, step), []

    def fail_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.EIO, "input/output error")
        return real(*arguments)

    monkeypatch.setattr(repair, step, fail_second)
    run("verify", cache, "--repair", "--", *harvest, code=1)
    assert len(calls) == 2
    assert tree(cache) == before


def test_repair_without_a_command_retracts_shards_and_prints_the_next_step(cache, harvest, tree):
    before = tree(cache)
    damage(cache)
    assert "run the harvest command again" in run("verify", cache, "--repair", code=8).stderr
    assert "2 shards are missing" not in run("inspect", cache).stdout
    assert "1 shards are missing" in run("inspect", cache).stdout
    waiting = run("verify", cache, code=8).stdout
    assert "retracted shards to harvest again: 1" in waiting
    assert "wrote 1 shards" in run("harvest", *harvest, "--out", cache).stdout
    assert tree(cache) == before


def test_an_invalid_harvest_command_is_rejected_before_shards_are_retracted(cache, tree):
    damage(cache)
    before = tree(cache)
    run("verify", cache, "--repair", "--", "model", "data.txt", "--no-such-option", code=2)
    run("verify", cache, "--", "model", "data.txt", code=2)
    run("verify", cache, "--no-such-option", code=2)
    assert tree(cache) == before


def test_a_folder_without_a_cache_is_reported(tmp_path):
    assert "is not a cache" in run("verify", tmp_path, code=9).stderr


def test_verify_reports_an_incomplete_cache(cache):
    (cache / "shards" / "END.json").unlink()
    assert f"{cache}: sound, incomplete; " in run("verify", cache).stdout


def test_repair_mends_metadata_without_a_command(harvest, tree, tmp_path):
    root = tmp_path / "zarr"
    run("harvest", *harvest, "--out", root, "--backend", "zarr")
    before = tree(root)
    (root / "activations" / "layers.1" / "zarr.json").unlink()
    flip(root / "shards" / "00001.json")
    assert "mended without a harvest: " in run("verify", root, "--repair").stderr
    assert tree(root) == before
    flip(root / "manifest.json")
    assert ": sound; " in run("verify", root, "--repair").stdout
    assert tree(root) == before


def test_repair_without_a_command_prints_the_next_step_for_any_damage(cache):
    (cache / "shards" / "END.json").write_text("{")
    assert "run the harvest command again" in run("verify", cache, "--repair", code=8).stderr


def flip_bit(path):
    """Flip a bit that a repair corrects without a harvest."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("backend", "step"),
    [
        ("memmap", 20),
        pytest.param("memmap", 1, marks=pytest.mark.soak),
        pytest.param("zarr", 1, marks=pytest.mark.soak),
    ],
)
def test_a_repair_killed_at_any_call_loses_no_byte_and_is_finished_by_the_same_command(
    backend, step, tiny_model, prose_file, killed, tree, tmp_path, warm_model
):
    command = [tiny_model, prose_file, "--ctx-len", 16, "--batch-size", 2, "--shard-size", 2]
    command += ["--max-tokens", 16 * 5, "--hookpoint", "layers.1", "--backend", backend]
    run("harvest", *command, "--out", tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    rows = sorted(name for name in whole if name.startswith("activations/") and "json" not in name)
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "whole", damaged)
    flip_bit(damaged / "manifest.json")
    flip_bit(damaged / "shards/00002.json")
    flip_bit(damaged / rows[0])
    (damaged / "tokens/00000.safetensors").unlink()
    (damaged / "shards/00001.json").write_text("[]")
    (damaged / "shards/END.json").write_text("?")
    before = tree(damaged)
    healthy = {name for name, digest in before.items() if whole[name] == digest}
    healthy.remove("shards/00000.json")  # it is kept in the record of its shard
    for number in itertools.count(step // 2, step):
        root = tmp_path / str(number)
        shutil.copytree(damaged, root)
        repair_it = ["verify", root, "--repair", "--", *command]
        ended = not killed(number, lambda repair_it=repair_it: run(*repair_it))
        found = tree(root)
        assert {name for name in healthy if found.get(name) != whole[name]} == set(), number
        receipt = json.loads((damaged / "shards/00000.json").read_text())
        records = [root / f"shards/00000{end}.json" for end in ("", ".retracted")]
        kept = [json.loads(path.read_text()) for path in records if path.exists()]
        assert receipt["files"] in [one.get("promised", one.get("files")) for one in kept], number
        for name, digest in found.items():  # what is not healthy is as it was, or right
            if name in whole and name not in ("shards/00001.json", "shards/END.json"):
                assert digest in (before.get(name), whole[name]), (number, name)
        if not ended:
            run(*repair_it)
        assert tree(root) == whole, number
        shutil.rmtree(root)
        if ended:
            break
    assert number > 60
