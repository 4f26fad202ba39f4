"""The commands in sequence, from `actcache harvest` to `saetrain eval`."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

import saetrain.training.step
from actcache.cache.reader import Cache
from actcache_cli.programs import actcache_app, saetrain_app


def run(app, *arguments):
    runner = CliRunner(env={"COLUMNS": "200"})  # wide, so that the expected text is on one line
    result = runner.invoke(app(), [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folders(tiny_model, prose_file, tmp_path_factory):
    """Create a cache and a run with the commands; returns their output, too."""
    root = tmp_path_factory.mktemp("commands")
    harvest = ["harvest", tiny_model, prose_file, "--out", root / "cache", "--ctx-len", 16]
    harvest += ["--batch-size", 2, "--shard-size", 8, "--hookpoint", "layers.1"]
    harvest += ["--hookpoint", "layers.1.mlp"]
    fit = ["fit", root / "cache", "--out", root / "run", "--expansion-factor", 2, "--k", 4]
    fit += ["--batch-size", 32, "--val-fraction", 0.2]
    printed = [run(actcache_app, *harvest), run(saetrain_app, *fit)]
    return root, harvest, fit, printed


def test_harvest_prints_one_summary_line(folders):
    root, _, _, (printed, _) = folders
    (line,) = printed.splitlines()
    assert line.startswith(f"{root / 'cache'}: wrote ")
    for word in ("shards", "rows x 2 hookpoints", "tokens/s", "complete"):
        assert word in line


def test_a_finished_harvest_is_not_repeated(folders):
    _, harvest, _, _ = folders
    assert "nothing left to do; complete" in run(actcache_app, *harvest)


def test_harvest_prints_json(folders):
    root, harvest, _, _ = folders
    summary = json.loads(run(actcache_app, *harvest, "--json"))
    assert summary["complete"]
    assert summary["new_shards"] == 0
    assert summary["cache"] == str(root / "cache")


def test_what_code_of_a_model_prints_is_not_amid_the_json(folders, tiny_model, monkeypatch):
    from transformers import LlamaConfig

    init = LlamaConfig.__init__

    def noisy(self, *args, **kwargs):
        print("printed by a model")
        init(self, *args, **kwargs)

    monkeypatch.setattr(LlamaConfig, "__init__", noisy)
    _, harvest, *_ = folders
    for words in (harvest, ["plan", *harvest[1:]], ["hookpoints", tiny_model]):
        result = CliRunner().invoke(actcache_app(), [*map(str, words), "--json"])
        assert json.loads(result.stdout)
        assert "printed by a model" in result.stderr


def test_harvest_reports_a_text_that_ends_before_the_goal(folders, tmp_path):
    root, harvest, *_ = folders
    harvest = [tmp_path if word == root / "cache" else word for word in harvest]
    for did in ("wrote ", "nothing left to do"):
        printed = run(actcache_app, *harvest, "--max-tokens", 10**6)
        assert did in printed
        assert "; complete: the text ended before --max-tokens, " in printed
    # The other harvest had no --max-tokens.
    all_of_it, short_of_goal = Cache.open(root / "cache"), Cache.open(tmp_path)
    assert short_of_goal.end == all_of_it.end
    assert short_of_goal.digest(short_of_goal.shards) == all_of_it.digest(all_of_it.shards)


def test_plan_prints_the_sizes_that_the_harvest_writes(folders):
    root, harvest, *_ = folders
    shown = run(actcache_app, "plan", *harvest[1:])
    cache = Cache.open(root / "cache")
    for words in (
        f"{cache.rows:,} at each hookpoint (left out: ",
        f"{len(cache.shards)} of 8 sequences",
        f"free at {root / 'cache'}: fits",
        "a process: weights ",
        "B libraries: Python, torch, transformers",
        "layers.1.mlp",
    ):
        assert words in shown
    told = json.loads(run(actcache_app, "plan", *harvest[1:], "--json"))
    assert (told["rows"], told["fits"], told["trial"]) == (cache.rows, True, None)
    bytes_of = dict.fromkeys(cache.hookpoints, 0)
    for receipt in cache.receipts.values():
        for name in bytes_of:
            bytes_of[name] += receipt.files[f"activations/{name}"].bytes
    assert told["hookpoints"] == bytes_of


def test_plan_with_measure_prints_the_time(folders, tmp_path):
    _, harvest, *_ = folders
    arguments = [
        tmp_path / "new" if harvest[i - 1] == "--out" else a for i, a in enumerate(harvest)
    ]
    shown = run(actcache_app, "plan", *arguments[1:], "--measure", "--measure-seconds", 0.2)
    assert "tokens/s), peak " in shown
    assert "on one process like this" in shown
    assert not list(tmp_path.iterdir())


def test_inspect_shows_the_pipeline_and_filters(tiny_model, prose_file, tmp_path):
    harvest = ["harvest", tiny_model, prose_file, "--out", tmp_path / "cache", "--ctx-len", 32]
    harvest += ["--layers", 0, "--pipeline", "truncate", "--exclude-special", "--exclude-tokens", 7]
    harvest += ["--exclude-tokens", "</s>", "--max-norm-ratio", 3, "--batch-size", 4]
    run(actcache_app, *harvest)
    shown = run(actcache_app, "inspect", tmp_path / "cache")
    assert "the beginning of each, to 32 tokens" in shown
    left_out = "left out: positions below 1; 2 special tokens; tokens 1, 7; norms over 3 times"
    assert left_out in shown


def test_hookpoints_lists_names_and_widths(tiny_model):
    lines = run(actcache_app, "hookpoints", tiny_model, "layers.1.mlp*").splitlines()
    assert lines[0].split() == ["hookpoint", "width", "module", "TransformerLens"]
    assert lines[1].split()[:4] == [
        "layers.1.mlp",
        "32",
        "model.layers.1.mlp",
        "blocks.1.hook_mlp_out",
    ]
    assert not any(":in" in line for line in lines)
    prefixed = run(actcache_app, "hookpoints", tiny_model, "model.layers.1.mlp:in")
    expected = ["layers.1.mlp:in", "32", "model.layers.1.mlp", "blocks.1.mlp.hook_in"]
    assert prefixed.splitlines()[1].split() == expected
    named = run(actcache_app, "hookpoints", tiny_model, "blocks.1.mlp.hook_post")
    assert named.splitlines()[1].startswith("layers.1.mlp.down_proj:in  ")
    result = CliRunner().invoke(actcache_app(), ["hookpoints", str(tiny_model), "layer.1"])
    assert result.exit_code == 5
    assert "layers.1" in result.stderr
    listed = json.loads(run(actcache_app, "hookpoints", tiny_model, "--json"))
    assert {
        "name": "layers.0",
        "width": 32,
        "reason": "",
        "module": "model.layers.0",
        "transformer_lens": ["blocks.0.hook_resid_post", "blocks.0.hook_out"],
    } in listed


def test_inspect_shows_the_source_and_each_hookpoint(folders, tiny_model):
    root, *_ = folders
    shown = run(actcache_app, "inspect", root / "cache", "--sample", 2, "--tokenizer", tiny_model)
    for word in (
        "LlamaForCausalLM",
        "prose.jsonl",
        "complete (the text ended)",
        "positions below 1",
    ):
        assert word in shown
    header = next(line for line in shown.splitlines() if line.startswith("hookpoint"))
    for column in ("width", "mean norm", "max norm", "max |x|", "norms", "outlier dims"):
        assert column in header
    assert shown.count("\nshard ") == 2


def test_inspect_without_a_tokenizer_shows_token_ids_and_a_warning(folders):
    root, *_ = folders
    result = CliRunner().invoke(actcache_app(), ["inspect", str(root / "cache"), "--sample", "1"])
    assert result.exit_code == 0
    assert "showing token ids" in result.stderr


def test_inspect_prints_json(folders):
    root, *_ = folders
    summary = json.loads(run(actcache_app, "inspect", root / "cache", "--json"))
    assert summary["complete"]
    assert [h["hookpoint"] for h in summary["hookpoints"]] == ["layers.1", "layers.1.mlp"]
    assert all(h["rows"] == summary["rows"] and h["non_finite"] == 0 for h in summary["hookpoints"])


def test_fit_prints_every_sae_and_the_folder_of_the_run(folders):
    root, _, _, (_, printed) = folders
    assert f"{root / 'run'}: " in printed
    assert "layers.1.mlp" in printed
    header, *rows = printed.splitlines()
    words = ["hookpoint", "FVU, last steps", "FVU, held out", "L0, last steps", "L0, held out"]
    words.append("dead % (")
    assert re.fullmatch(r" +".join(map(re.escape, words)) + r"[\d,]+ rows\)", header)
    evaluated = json.loads(run(saetrain_app, "eval", root / "run", "--json"))
    found = {row.split()[0]: row.split()[2] for row in rows[:2]}
    assert found == {sae["name"]: f"{sae['fvu']:.4f}" for sae in evaluated["saes"]}


def test_fit_needs_resume_for_an_existing_run(folders):
    _, _, fit, _ = folders
    result = CliRunner().invoke(saetrain_app(), [str(a) for a in fit])
    assert result.exit_code == 11
    assert "--resume" in result.stderr
    assert "nothing left to do" in run(saetrain_app, *fit, "--resume")


def test_eval_prints_and_writes_the_table_of_held_out_rows(folders):
    root, *_ = folders
    shown = run(saetrain_app, "eval", root / "run")
    header, *rows = shown.splitlines()
    expected = ["hookpoint", "latents", "k", "FVU", "L0", "dead", "%", "fired", "%", "rows/s"]
    assert header.split() == expected
    assert [row.split()[0] for row in rows[:2]] == ["layers.1", "layers.1.mlp"]
    assert "not fired in the last" in shown
    written = json.loads((root / "run" / "eval.json").read_text())
    assert written["saes"] == json.loads(run(saetrain_app, "eval", root / "run", "--json"))["saes"]


def test_eval_of_an_unfinished_run_shows_dashes_for_unknown_values(folders, tmp_path, monkeypatch):
    _, _, fit, _ = folders
    fit = [a if a != folders[0] / "run" else tmp_path / "run" for a in fit] + ["--save-every", 1]
    real = saetrain.training.step.train_step

    def step(trainer, rows, number):
        if number == 2:
            raise KeyboardInterrupt
        real(trainer, rows, number)

    monkeypatch.setattr(saetrain.training.step, "train_step", step)
    result = CliRunner().invoke(saetrain_app(), [str(a) for a in fit])
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    shown = run(saetrain_app, "eval", tmp_path / "run", "--device", "cpu")
    assert re.search(r"step 2 of \d+: the run is unfinished; saetrain fit .*--resume", shown)
    row = shown.splitlines()[1].split()
    assert (row[5], row[7]) == ("-", "-")


def test_fit_prints_warnings_on_stderr(folders, tmp_path):
    root, _, fit, _ = folders
    copy = shutil.copytree(root / "cache", tmp_path / "cache")
    (copy / "shards" / "END.json").unlink()
    paths = {root / "cache": copy, root / "run": tmp_path / "run"}
    fit = [str(paths.get(a, a)) for a in fit]
    result = CliRunner().invoke(saetrain_app(), fit)
    assert result.exit_code == 0, result.output
    assert "warning: " in result.stderr
    assert "is not complete: shards there" in result.stderr
