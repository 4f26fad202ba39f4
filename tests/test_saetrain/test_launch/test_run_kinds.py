"""Whole runs of every kind of SAE: by the command, interrupted, evaluated."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from typer.testing import CliRunner

import saetrain.training.step
from actcache.cache.reader import Cache
from actcache.errors import ConfigError, HookpointError, RunError
from actcache_cli.programs import saetrain_app as app
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import vary
from saetrain.evaluation import evaluate
from saetrain.formats.sparsify import load_sae, read_config
from saetrain.launch.estimate import estimate_fit
from saetrain.launch.run import fit
from saetrain.runs.record import read_run

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

IN, OUT = "layers.0.mlp:in", "layers.0.mlp"

KINDS: dict[str, dict[str, Any]] = {
    "batchtopk": {"activation": "batchtopk"},
    "groupmax": {"activation": "groupmax"},
    "jumprelu": {"activation": "jumprelu", "bandwidth": 0.2, "threshold": 0.05},
    "relu": {"activation": "relu", "sparsity": 0.02, "sparsity_warmup_steps": 5},
    "gated": {"activation": "gated"},
    "multi-topk": {"multi_topk": True},
    "matryoshka": {"matryoshka": (8, 20)},
    "matryoshka of batchtopk": {"matryoshka": (8, 20), "activation": "batchtopk"},
    "transcoder": {"transcode": True},
    "skip transcoder": {"transcode": True, "skip_connection": True, "activation": "batchtopk"},
    "crosscoder": {"crosscode": True, "hookpoint": (OUT, "layers.1")},
    "gated crosscoder": {"crosscode": True, "activation": "gated", "hookpoint": ("*",)},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="session")
def paired(make_cache: Callable[..., Path]) -> Path:
    """Rows of a module's input and output and of another hookpoint, from the same latents."""

    def rows(hookpoint: str, shard: int, count: int, width: int) -> NDArray[np.float32]:
        state = np.random.RandomState([11, shard])
        codes = (1 + state.random_sample((count, 24))) * (state.random_sample((count, 24)) < 0.15)
        directions = np.random.RandomState(ord(hookpoint[-1])).standard_normal((24, width))
        return (codes @ directions + 0.5).astype(np.float32)

    return make_cache(hookpoints={IN: 16, OUT: 12, "layers.1": 16}, rows=rows)


@pytest.fixture
def kind_options(options: Options, paired: Path) -> Options:
    def make(kind: str, **changes: Any) -> FitConfig:
        return options(**{"cache": str(paired), "hookpoint": (OUT,)} | KINDS[kind] | changes)

    return make


def words_of(config: FitConfig) -> list[str]:
    """Return the command line of a kind."""
    words = ["fit", config.cache, "--out", config.out, "--device", "cpu", "--num-latents", "48"]
    words += ["--k", "3", "--batch-size", "32", "--lr", "0.01", "--log-every", "4", "--epochs", "4"]
    words += ["--dead-after", "64"]
    for name in KINDS_OPTIONS:
        value, option = getattr(config, name), "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif isinstance(value, tuple):
            words += [word for item in value for word in (option, str(item))]
        elif value not in (None, False):
            words += [option, str(value)]
    return words


KINDS_OPTIONS = {name for kind in KINDS.values() for name in kind} | {"hookpoint"}


@EVERY_KIND
def test_the_command_trains_and_evaluates_every_kind(kind_options: Options, kind: str) -> None:
    config = kind_options(kind)
    result = CliRunner().invoke(app(), words_of(config))
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app(), ["eval", config.out, "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    (sae,) = json.loads(result.stdout)["saes"]
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(lines[i])["saes"][sae["hookpoint"]] for i in (0, -1))
    assert last["fvu"] < 0.9 * first["fvu"]  # the loss falls
    assert sae["fvu"] < 1
    assert 0 < sae["l0"] <= 48
    assert (sae["k"] is None) == (config.activation in ("jumprelu", "relu", "gated"))
    assert sae["fvu"] == pytest.approx(last["fvu"], rel=0.5)  # of the saved SAE


RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "jumprelu, folded, three batches an update": (
        "jumprelu",
        {"optimizer": "adam", "decoder_norm": "fold", "grad_acc_steps": 3},
    ),
    "batchtopk in bfloat16, folded, k falls": (
        "batchtopk",
        {
            "decoder_norm": "fold",
            "k_anneal_steps": 20,
            "weights_dtype": "bfloat16",
            "defaults": 1,
        },
    ),
    "multi-topk by muon, k falls": ("multi-topk", {"optimizer": "muon", "k_anneal_steps": 7}),
    "gated crosscoder, clipped, folded, in parts": (
        "gated crosscoder",
        {"optimizer": "adamw", "decoder_norm": "fold", "micro_batch_size": 12, "grad_clip": 1.0},
    ),
    "skip transcoder by muon, free, two batches an update": (
        "skip transcoder",
        {"optimizer": "muon", "decoder_norm": "free", "grad_acc_steps": 2},
    ),
}
"""A few kinds with options of `test_run_recipes`."""


class Killed(BaseException):
    """Stands in for a signal: no handler may catch it."""


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    list(zip(KINDS, itertools.cycle(("signum", "adam", "adam", "signum")), strict=False)),
)
def test_a_stopped_run_of_every_kind_resumes_to_the_same_bytes(
    kind_options: Options,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    optimizer: str,
) -> None:
    stop_and_resume(kind_options, snapshot, monkeypatch, kind, {"optimizer": optimizer})


@pytest.mark.parametrize("name", RECIPES)
def test_a_stopped_run_with_other_options_resumes_to_the_same_bytes(
    kind_options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind, settings = RECIPES[name]
    out = stop_and_resume(kind_options, snapshot, monkeypatch, kind, {"epochs": 2, **settings})
    for sae in evaluate(out, device="cpu").saes:
        assert sae.fvu < 1
        assert sae.k in (3, None)
        weights = load_file(out / sae.hookpoint / "sae.safetensors")
        norms = weights["W_dec"].float().norm(dim=1)
        # The rows of a crosscoder have norm 1 before its hookpoints' scales are folded into them.
        any_norm = settings.get("decoder_norm") == "free" or "crosscoder" in kind
        if settings.get("decoder_norm") == "fold" and not any_norm:
            torch.testing.assert_close(norms, torch.ones(48), rtol=0, atol=0.02)  # of bfloat16
        saved = read_config(out / sae.hookpoint)
        assert saved.normalize_decoder is not any_norm


def stop_and_resume(
    kind_options: Options,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    changes: dict[str, Any],
) -> Path:
    """Compare a run with one stopped before its ninth step and resumed; return its folder."""
    changes = {"save_every": 5, **changes}
    whole = kind_options(kind, **changes, out=kind_options(kind).out + "-whole")
    stopped = kind_options(kind, **changes)
    fit(whole)
    with monkeypatch.context() as patch:
        real, steps = saetrain.training.step.train_step, []

        def step(*arguments: Any) -> None:
            steps.append(arguments)
            if len(steps) == 9:
                raise Killed
            real(*arguments)

        patch.setattr(saetrain.training.step, "train_step", step)
        with pytest.raises(Killed):
            fit(stopped)
    fit(kind_options(kind, **changes, resume=True))
    assert snapshot(Path(stopped.out)) == snapshot(Path(whole.out))
    return Path(whole.out)


def test_the_threshold_of_batchtopk_is_trained_saved_and_used(kind_options: Options) -> None:
    adam = {"optimizer": "adam", "lr": 3e-3, "epochs": 20}
    config = kind_options("batchtopk", **adam, hookpoint=("layers.1",))
    fit(config)
    folder = Path(config.out) / "layers.1"
    assert load_file(folder / "sae.safetensors")["threshold"] > 0
    assert not load_sae(folder).training
    (sae,) = evaluate(Path(config.out), device="cpu").saes
    assert sae.l0 == pytest.approx(3, rel=0.2)  # by the threshold alone, k on average
    assert sae.k == 3


def test_a_transcoder_reads_the_input_of_a_module_and_predicts_its_output(
    kind_options: Options,
) -> None:
    config = kind_options("skip transcoder", hookpoint=(), lr=1e-30)
    fit(config)
    record = read_run(Path(config.out))
    (entry,) = record.saes  # layers.1 has no input in the cache
    assert (entry.hookpoint, entry.reads, entry.predicts) == (OUT, (IN,), (OUT,))
    assert (entry.config.d_in, entry.config.width_out) == (16, 12)
    cache, folder = Cache.open(config.cache), Path(config.out) / OUT
    sae = load_sae(folder)
    assert (sae.W_dec.abs() < 1e-20).all()
    mean = cache.statistics(OUT, record.training_shards).mean
    assert sae.b_dec.detach().numpy() == pytest.approx(mean, rel=1e-6)
    assert read_config(folder).hookpoints == (IN,)
    # A decoder of zeros predicts the output's mean.
    (evaluation,) = evaluate(Path(config.out), device="cpu").saes
    assert evaluation.fvu == pytest.approx(1, rel=1e-5)


def test_the_held_out_fvu_of_a_transcoder_is_of_its_output(kind_options: Options) -> None:
    config = kind_options("transcoder", epochs=3)
    fit(config)
    record, cache = read_run(Path(config.out)), Cache.open(config.cache)
    sae = load_sae(Path(config.out) / OUT)
    mean = torch.from_numpy(cache.statistics(OUT, record.training_shards).mean)
    error = variance = 0.0
    for shard in record.held_out:
        x, y = (torch.from_numpy(cache.read(name, shard).values) for name in (IN, OUT))
        error += float((y - sae(x).reconstruction).pow(2).sum().detach())
        variance += float((y - mean).pow(2).sum())
    (evaluation,) = evaluate(Path(config.out), device="cpu").saes
    assert evaluation.fvu == pytest.approx(error / variance, rel=1e-5)


def test_a_crosscoder_logs_the_loss_and_decoder_norms_of_every_hookpoint(
    kind_options: Options, sparsify: ModuleType
) -> None:
    config = kind_options("crosscoder", epochs=3, input_scale="none")
    summary = fit(config)
    line = summary.saes["crosscoder"]
    fvus = [line[f"fvu/{name}"] for name in (OUT, "layers.1")]
    assert line["fvu"] == pytest.approx(sum(fvus) / 2)
    assert all(0.1 < line[f"norm/{name}"] < 1 for name in (OUT, "layers.1"))
    (sae,) = evaluate(Path(config.out), device="cpu").saes
    assert list(sae.parts) == [OUT, "layers.1"]
    assert sae.fvu == pytest.approx(sum(part.fvu for part in sae.parts.values()) / 2)
    shown = CliRunner().invoke(app(), ["eval", config.out, "--device", "cpu"]).stdout
    assert "crosscoder at layers.1: FVU" in shown
    peer = sparsify.SparseCoder.load_many(config.out, local=True)["crosscoder"]
    assert (peer.d_in, read_config(Path(config.out) / "crosscoder").widths) == (28, (12, 16))


@pytest.mark.parametrize("kind", ["batchtopk", "skip transcoder", "gated crosscoder", "jumprelu"])
def test_validation_of_a_grid_equals_evaluation_of_the_saved_saes(
    kind_options: Options, kind: str
) -> None:
    """For inference thresholds, transcoder outputs, and each hookpoint of a crosscoder."""
    config = vary(kind_options(kind, val_every=4, save_best=True, optimizer="adam"), seed=(0, 1))
    summary = fit(config)
    saes = evaluate(Path(config.out), device="cpu").saes
    assert [sae.name.rpartition("/")[2] for sae in saes] == ["seed0", "seed1"]
    assert saes[0].fvu != saes[1].fvu
    for sae in saes:
        found = summary.held_out[sae.name]
        assert found == pytest.approx({"fvu": sae.fvu, "l0": sae.l0}, rel=1e-5)
    for sae in evaluate(Path(config.out), device="cpu", best=True).saes:
        assert sae.fvu == pytest.approx(summary.best[sae.name].fvu, rel=1e-5)


def test_validation_does_not_change_the_training_of_batchtopk(kind_options: Options) -> None:
    plain = kind_options("batchtopk")
    validated = replace(plain, out=plain.out + "-validated", val_every=1)
    fit(plain)
    fit(validated)
    one, other = (load_file(Path(c.out) / OUT / "sae.safetensors") for c in (plain, validated))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_grid_of_activations_has_one_folder_each(
    kind_options: Options,
) -> None:
    config = vary(kind_options("batchtopk"), activation=("topk", "relu", "batchtopk"))
    fit(config)
    names = [sae.name for sae in evaluate(Path(config.out), device="cpu").saes]
    assert names == [f"{OUT}/topk", f"{OUT}/relu", f"{OUT}/batchtopk"]
    plan = estimate_fit(config, torch.device("cpu"))
    assert [(sae.name, sae.k) for sae in plan.saes] == list(zip(names, (3, None, 3), strict=True))
    with pytest.raises(ConfigError, match="--k is unused with --sparsity"):
        vary(kind_options("relu"), k=(3, 4))


@pytest.mark.parametrize("folded", [True, False])
def test_logged_decoder_norms_are_those_of_the_saved_weights(
    kind_options: Options, folded: bool
) -> None:
    norm = "fold" if folded else "free"
    kind = {"optimizer": "adam", "lr": 0.05, "input_scale": "none"}
    config = kind_options("crosscoder", decoder_norm=norm, **kind)
    line = fit(config).saes["crosscoder"]
    W_dec = load_file(Path(config.out) / "crosscoder" / "sae.safetensors")["W_dec"]
    for name, piece in zip((OUT, "layers.1"), W_dec.split([12, 16], dim=1), strict=True):
        assert line[f"norm/{name}"] == pytest.approx(float(piece.norm(dim=1).mean()), rel=1e-5)
    assert bool((W_dec.norm(dim=1) - 1).abs().max() < 1e-5) is folded


def test_the_threshold_of_batchtopk_follows_an_annealed_k(
    kind_options: Options,
) -> None:
    config = kind_options("batchtopk", hookpoint=("layers.1",), k_anneal_steps=10, lr=1e-3)
    fit(config)  # 12 steps
    (sae,) = evaluate(Path(config.out), device="cpu").saes
    assert sae.l0 == pytest.approx(3, rel=0.35)


def test_non_finite_rows_are_found_in_all_inputs_and_targets_of_an_sae(
    kind_options: Options, make_cache: Callable[..., Path]
) -> None:
    def rows(hookpoint: str, shard: int, count: int, width: int) -> NDArray[np.float32]:
        made = np.random.RandomState(shard).standard_normal((count, width)).astype(np.float32)
        if hookpoint == IN and shard == 2:
            made[5, 3] = np.inf
        return made

    cache = make_cache(hookpoints={IN: 16, OUT: 12}, rows=rows, row_order="sequence")
    for options in ({}, {"transcode": False, "crosscode": True, "hookpoint": ("*",)}):
        config = kind_options("transcoder", cache=str(cache), val_fraction=0.0, **options)
        config = vary(replace(config, out=f"{config.out}-{config.crosscode}"), seed=(0, 1))
        with pytest.raises(RunError, match=r"shard 2 row 5: not finite(.|\n)*mlp:in out, or"):
            fit(config)


def test_kinds_without_their_hookpoints_in_the_cache_are_refused(
    kind_options: Options, options: Options
) -> None:
    with pytest.raises(HookpointError, match=r"--hookpoint layers\.1 --hookpoint layers\.1:in"):
        fit(kind_options("transcoder", hookpoint=("layers.1",)))
    with pytest.raises(HookpointError, match="no input"):
        fit(options(transcode=True))
    with pytest.raises(HookpointError, match="at least two"):
        fit(kind_options("crosscoder", hookpoint=("layers.1",)))
    with pytest.raises(ConfigError, match="groupmax"):
        fit(kind_options("groupmax", k=5))
    with pytest.raises(ConfigError, match="--matryoshka"):
        fit(kind_options("matryoshka", matryoshka=(48,)))
