"""`actcache convert` as a user runs it."""

import json

import pytest
from typer.testing import CliRunner

from actcache_cli.programs import actcache_app, saetrain_app


def run(*arguments, code=0, app=actcache_app):
    result = CliRunner().invoke(app(), [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def source(make_cache):
    return make_cache(shards=4, dtype="bfloat16")


def test_convert_prints_one_summary_line(source, tmp_path):
    out = tmp_path / "out"
    (line,) = run("convert", source, "--out", out, "--dtype", "int8").stdout.splitlines()
    assert line.startswith(f"{out}: converted 4 shards, 512 rows x 2 hookpoints, ")
    assert line.endswith("; complete, 512 rows in 4 shards")
    again = run("convert", source, "--out", out, "--dtype", "int8").stdout
    assert again == f"{out}: nothing left to do; complete, 512 rows in 4 shards\n"
    assert "sound" in run("verify", out).stdout
    assert "rows were rounded to bfloat16 before" in run("inspect", out).stdout


def test_convert_reports_an_unfinished_source(make_cache, tmp_path):
    printed = run("convert", make_cache(end=False), "--out", tmp_path / "out").stdout
    assert "incomplete, as the source is: convert again later" in printed


def test_convert_prints_json(source, tmp_path):
    out, how = tmp_path / "out", ["--backend", "zarr", "--compress", "zstd", "--json"]
    summary = json.loads(run("convert", source, "--out", out, *how).stdout)
    assert summary["complete"]
    assert (summary["new_shards"], summary["new_rows"], summary["via"]) == (4, 512, [])
    assert summary["cache"] == str(out)


def test_a_damaged_source_gives_the_exit_code_of_corruption(source, tmp_path):
    (source / "tokens" / "00002.safetensors").unlink()
    failed = run("convert", source, "--out", tmp_path / "out", code=8)
    assert "tokens/00002.safetensors" in failed.stderr
    assert "2 shards" in run("verify", tmp_path / "out").stdout


def test_a_converted_cache_can_be_trained_from(source, tmp_path):
    out = tmp_path / "eight"
    run("convert", source, "--out", out, "--dtype", "float8_e4m3", "--backend", "zarr")
    fit = ["fit", out, "--out", tmp_path / "run", "--k", 4, "--batch-size", 32]
    assert "layers.1" in run(*fit, app=saetrain_app).stdout
    assert "held-out rows" in run("eval", tmp_path / "run", app=saetrain_app).stdout
