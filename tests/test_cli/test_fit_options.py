"""`saetrain fit` with repeated options, --plan and --config."""

import json

import pytest
import typer
from typer.testing import CliRunner

from actcache_cli.fit_options import fit_command, is_repeatable
from actcache_cli.programs import saetrain_app
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import AXES, grid
from saetrain.config.sae import HookpointOverride


def parse(*arguments):
    """Parse arguments; returns the configuration, --plan and --json."""
    seen = []
    app = typer.Typer()
    app.command()(fit_command(lambda *given: seen.append(given)))
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return seen[0]


@pytest.fixture
def run(make_cache, tmp_path):
    """Run `saetrain` in a folder with a cache; returns what it printed."""
    cache = make_cache(tmp_path / "cache")
    small = ["--num-latents", 32, "--batch-size", 32, "--device", "cpu"]

    def invoke(*arguments, code=0):
        given = [str(a) for a in arguments]
        if given[:1] == ["fit"]:
            given += map(str, [cache, *small])
        result = CliRunner().invoke(saetrain_app(), given)
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.stderr

    return invoke


def test_a_bare_command_line_gives_the_defaults():
    assert parse("c", "--out", "r") == (FitConfig("c", "r"), False, False)


def test_repeated_options_give_a_grid():
    arguments = ["c", "--out", "r", "--k", 16, "--k", 32, "--lr", "1e-3", "--lr", "3e-4"]
    arguments += ["--seed", 0, "--seed", 1]
    config, _, _ = parse(*arguments, "--optimizer", "adam", "--batch-size", 8)
    saes = grid(k=(16, 32), optimizer="adam", lr=(1e-3, 3e-4), seed=(0, 1))
    assert config == FitConfig("c", "r", saes=saes, batch_size=8)
    config, _, _ = parse("c", "--out", "r", "--optimizer", "adam", "--optimizer", "signum")
    assert [sae.optimizer for sae in config.saes] == ["adam", "signum"]
    assert parse("c", "--out", "r", "--k", 16)[0] == FitConfig("c", "r", k=16)


def test_every_option_of_an_sae_is_repeatable_but_flags():
    assert {name for name in AXES if not is_repeatable(name)} == {"multi_topk"}
    assert not any(is_repeatable(name) for name in ("batch_size", "hookpoint", "out"))


def test_a_file_supplies_options_that_the_command_line_omits(tmp_path):
    path = tmp_path / "fit.toml"
    path.write_text(
        'cache = "c"\nk = [16, 32]\nfollow = true\njson = true\nbatch-size = 8\n'
        "[hookpoints.a]\nlr = 0.5\nk = 3\n"
    )
    config, plan, as_json = parse("--config", path, "--out", "r", "--plan")
    overrides = {"a": HookpointOverride(lr=0.5, k=3)}
    assert config == FitConfig(
        "c", "r", saes=grid(k=(16, 32)), follow=True, batch_size=8, hookpoints=overrides
    )
    assert (plan, as_json) == (True, True)
    config, _, _ = parse("other", "--config", path, "--out", "r", "--k", 32, "--no-follow")
    overrides = {"a": HookpointOverride(lr=0.5)}
    assert config == FitConfig("other", "r", k=32, batch_size=8, hookpoints=overrides)


def test_a_default_given_on_the_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "fit.yaml"
    path.write_text("k: 64\nbatch-size: 8\n")
    config, _, _ = parse("c", "--config", path, "--out", "r", "--k", 32, "--batch-size", 4096)
    assert config == FitConfig("c", "r")


def test_missing_and_unknown_options_give_the_exit_code_of_bad_configuration(
    run, tmp_path, make_cache
):
    assert "--out is missing" in run("fit", code=2)
    (tmp_path / "fit.toml").write_text("kk = 3\n")
    printed = run("fit", "--config", tmp_path / "fit.toml", code=2)
    assert "kk" in printed
    assert "perhaps k" in printed
    assert not (tmp_path / "run").exists()


def test_plan_prints_the_saes_and_their_memory_and_trains_nothing(run, tmp_path):
    out = tmp_path / "run"
    plan = run("fit", "--out", out, "--k", 2, "--k", 4, "--plan")
    header, *rows = plan.splitlines()
    columns = "SAE d_in latents k optimizer lr seed parameters weights optimizer state gradients"
    assert header.split() == [*columns.split(), "activations"]
    assert [row.split()[0] for row in rows[:4]] == [
        f"layers.{layer}/k{k}" for layer in (0, 1) for k in (2, 4)
    ]
    assert rows[4].split()[:2] == ["all", "4"]
    assert len({len(row) for row in rows[:5]} | {len(header)}) == 1
    assert "are free beside the libraries: fits" in plan
    assert not out.exists()
    printed = json.loads(run("fit", "--out", out, "--k", 2, "--k", 4, "--plan", "--json"))
    assert [sae["name"] for sae in printed["saes"]] == [row.split()[0] for row in rows[:4]]
    assert printed["parameters"] == 4 * (2 * 16 * 32 + 16 + 32)
    assert not out.exists()


def test_a_grid_is_fitted_resumed_and_evaluated_under_its_names(run, tmp_path):
    out = tmp_path / "run"
    shown = run("fit", "--out", out, "--k", 2, "--k", 4)
    assert "SAE" in shown
    names = [f"layers.{layer}/k{k}" for layer in (0, 1) for k in (2, 4)]
    assert all(name in shown for name in names)
    assert "nothing left to do" in run("fit", "--out", out, "--k", 2, "--k", 4, "--resume")
    assert "--k: [2, 4] then, 2 now" in run("fit", "--out", out, "--k", 2, "--resume", code=11)
    printed = json.loads(run("fit", "--out", out, "--k", 2, "--k", 4, "--resume", "--json"))
    assert list(printed["saes"]) == names
    header, *rows = run("eval", out).splitlines()
    assert header.split()[0] == "SAE"
    assert [row.split()[0] for row in rows[:4]] == names


def test_run_json_as_config_resumes_its_run_or_starts_another(run, tmp_path):
    out = tmp_path / "run"
    run("fit", "--out", out, "--k", 2, "--k", 4)
    app, file = saetrain_app(), str(out / "run.json")
    again = CliRunner().invoke(app, ["fit", "--config", file, "--resume"])
    assert "nothing left to do" in again.stdout
    other = CliRunner().invoke(app, ["fit", "--config", file, "--out", str(tmp_path / "other")])
    assert other.exit_code == 0
    for name in ("metrics.jsonl", "layers.1/k4/sae.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_fit_prints_validations_and_best_saes(run, tmp_path):
    out = tmp_path / "run"
    shown = run("fit", "--out", out, "--val-every", 4, "--save-best", "--k", 2)
    header, *rows = shown.splitlines()
    assert header.split()[-3:] == ["best", "at", "step"]
    assert rows[0].split()[-1] == "12"
    *_, last = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert rows[0].split()[2] == f"{last['val']['layers.0']['fvu']:.4f}"
    shown = run("eval", out, "--best")
    assert shown.splitlines()[0].split()[-1] == "step"
    assert f"{out}/HOOKPOINT/best-STEP" in shown
    assert (out / "eval-best.json").exists()
    assert not (out / "eval.json").exists()
