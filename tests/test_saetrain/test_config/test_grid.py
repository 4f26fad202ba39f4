"""SAEs of a grid: names, and equality with single runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import saetrain.config.grid
import saetrain.training.loop
import saetrain.training.step
from actcache.cache.reader import Cache
from actcache.errors import ConfigError, HookpointError, RunError
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import AXES, grid, saes_at, short_number, vary
from saetrain.config.sae import HookpointOverride, SaeOptions
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.runs.checkpoint import load_checkpoint
from saetrain.runs.record import RUN, read_run
from saetrain.tracking.jsonl import METRICS

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]


class Killed(BaseException):
    """Exception that the project must not catch, in place of a signal."""


# --- the list, and its names ---------------------------------------------------------------------


def named(**values: Any) -> list[str]:
    return list(saes_at(vary(FitConfig("c", "r"), **values), "layers.0"))


def test_a_grid_has_every_combination_and_the_last_option_varies_fastest() -> None:
    assert [(sae.k, sae.lr) for sae in grid(lr=(1e-3, 3e-4), k=(16, 32))] == [
        (16, 1e-3),
        (16, 3e-4),
        (32, 1e-3),
        (32, 3e-4),
    ]
    assert grid(k=7) == (SaeOptions(k=7),)


def test_a_thousand_saes_are_compared_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    real, compared = saetrain.config.grid._effective, []

    def count(sae: SaeOptions) -> SaeOptions:
        compared.append(sae)
        return real(sae)

    monkeypatch.setattr(saetrain.config.grid, "_effective", count)
    saes = grid(k=tuple(range(1, 11)), seed=tuple(range(100)))
    assert len(compared) == len(saes) == 1000


def test_names_contain_only_the_options_that_vary() -> None:
    assert named(k=(16, 32), lr=(1e-3, 3e-4), seed=(0, 1))[:3] == [
        "k16-lr1e-3-seed0",
        "k16-lr1e-3-seed1",
        "k16-lr3e-4-seed0",
    ]
    assert named(k=32, lr=1e-3) == [""]
    assert named(k=(32,)) == [""]
    assert named(optimizer=("signum", "adam"), lr_warmup_steps=(0, 100))[0] == "signum-warmup0"
    assert named(expansion_factor=(8, 16), auxk_alpha=(0.0, 1 / 32))[1] == "x8-auxk3.125e-2"
    assert named(num_latents=(4096, 8192)) == ["latents4096", "latents8192"]


@pytest.mark.parametrize("axis", AXES)
def test_every_option_of_an_sae_can_be_an_axis_and_is_in_the_name(axis: str) -> None:
    hint = get_type_hints(SaeOptions)[axis]
    (kind, *_) = get_args(hint) if type(None) in get_args(hint) else (hint,)
    choices = get_args(kind) if get_origin(kind) is Literal else (1, 0.5)
    values = {int: (40, 41), bool: (False, True)}.get(kind, choices)[:2]
    values = (0.5, 0.25) if axis in ("beta1", "beta2") else values
    others = {
        "lr_decay_steps": {"lr_schedule": "stable-then-decay"},
        "lr_end": {"lr_schedule": "linear"},
        "weight_decay": {"optimizer": "adamw"},
        "grad_clip": {"optimizer": "adam"},
        "k_start": {"k_anneal_steps": 5},
        "sparsity": {"activation": "relu"},
        "sparsity_warmup_steps": {"activation": "relu"},
        "threshold": {"activation": "jumprelu"},
        "bandwidth": {"activation": "jumprelu"},
        "target_l0": {"activation": "relu"},
        "frequency_penalty": {"activation": "jumprelu", "target_l0": 3.0},
    }
    names = named(**{axis: values}, **others.get(axis, {}))
    assert len(set(names)) == 2
    assert all(name and "/" not in name for name in names)


def test_numbers_in_names_are_short_and_distinct() -> None:
    assert [short_number(x) for x in (1e-3, 3e-4, 0.5, 2.5e-4, 0.01, 1.0, 0.0, 1e10, 12.5)] == [
        "1e-3",
        "3e-4",
        "0.5",
        "2.5e-4",
        "1e-2",
        "1",
        "0",
        "1e10",
        "12.5",
    ]
    numbers = [m * 10.0**e for e in range(-12, 13) for m in (1, 1.0000000000000002, 2.5, 9.99)]
    assert len({short_number(x) for x in numbers}) == len(set(numbers))
    assert all(float(short_number(x)) == x for x in numbers)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": (32, 32)}, "--k needs distinct values"),
        ({"k": ()}, "--k needs distinct values"),
        (
            {"num_latents": 64, "expansion_factor": (1, 2)},
            "--num-latents overrides --expansion-factor",
        ),
        ({"lr": (1e-3, -1.0)}, "--lr is out of range"),
    ],
    ids=str,
)
def test_a_grid_with_equal_saes_is_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(**values)


def test_sae_options_beside_a_list_of_saes_are_rejected() -> None:
    with pytest.raises(ConfigError, match="saes and options of one SAE"):
        FitConfig("c", "r", k=7, saes=grid(lr=(1e-3, 3e-4)))
    config = FitConfig("c", "r", saes=grid(k=(7, 8), seed=(5, 6)))
    assert (config.k, config.order_seed) == (7, 5)
    assert dataclasses.replace(config, data_seed=9).order_seed == 9


def test_overrides_apply_to_the_hookpoints_that_match_their_pattern() -> None:
    config = vary(FitConfig("c", "r", num_latents=64), k=(2, 4), lr=(1e-3, 1e-2))
    overrides = {
        "layers.1*": HookpointOverride(k=8),
        "*.12": HookpointOverride(lr=0.5, expansion_factor=3),
    }
    config = dataclasses.replace(config, hookpoints=overrides)
    assert list(saes_at(config, "layers.0")) == ["k2-lr1e-3", "k2-lr1e-2", "k4-lr1e-3", "k4-lr1e-2"]
    assert list(saes_at(config, "layers.1")) == ["lr1e-3", "lr1e-2"]
    assert {sae.k for sae in saes_at(config, "layers.1").values()} == {8}
    expected = SaeOptions(k=8, lr=0.5, expansion_factor=3)
    assert saes_at(config, "layers.12") == {"": expected}


def test_two_patterns_that_set_one_option_of_a_hookpoint_are_rejected(options: Options) -> None:
    """Otherwise the result would depend on the order of keys in the file."""
    config = options(hookpoints={"layers.*": HookpointOverride(k=2), "*.1": HookpointOverride(k=4)})
    with pytest.raises(ConfigError, match=r"two patterns set k of layers\.1(.|\n)*'\*\.1'"):
        fit(config)
    with pytest.raises(HookpointError, match=r"the override pattern 'layers\.7'"):
        fit(options(hookpoints={"layers.7": HookpointOverride(k=2)}))
    assert not Path(config.out).exists()


# --- a run of many -------------------------------------------------------------------------------


AXES_OF_TEN = {"k": (3, 5), "lr": (0.01, 0.002), "optimizer": ("signum", "adam")}


def test_a_grid_run_equals_the_single_runs(options: Options, tmp_path: Path) -> None:
    """Compare each SAE's files, its checkpoint and its metrics in every line."""
    config = vary(options(num_latents=None), expansion_factor=(2, 4), seed=(1, 0), **AXES_OF_TEN)
    overrides = {"layers.1": HookpointOverride(k=4)}
    config = dataclasses.replace(config, hookpoints=overrides)
    fit(config)
    root, record = Path(config.out), read_run(Path(config.out))
    assert len(record.saes) == 32 + 16
    checkpoint = load_checkpoint(root)
    assert checkpoint is not None
    lines = [json.loads(line) for line in (root / METRICS).read_text().splitlines()]
    assert lines[1]["saes"][record.saes[0].name]["auxk"] > 0
    for number in (0, 1, 7, 16, 31, 32, 40, 47):  # every value of every option
        entry = record.saes[number]
        single = dataclasses.replace(
            config,
            **vars(entry.options),
            saes=(),
            hookpoints={},
            data_seed=1,
            hookpoint=(entry.hookpoint,),
            out=str(tmp_path / f"single{number}"),
        )
        fit(single)
        alone = Path(single.out)
        for name in ("cfg.json", "sae.safetensors"):
            expected = (alone / entry.hookpoint / name).read_bytes()
            assert (root / entry.name / name).read_bytes() == expected
        its_checkpoint = load_checkpoint(alone)
        assert its_checkpoint is not None
        assert checkpoint[0].saes[number] == its_checkpoint[0].saes[0]
        its_lines = [json.loads(line) for line in (alone / METRICS).read_text().splitlines()]
        for line, its_line in zip(lines, its_lines, strict=True):
            assert line["saes"][entry.name] == its_line["saes"][entry.hookpoint]


def test_the_first_seed_is_that_of_the_order_of_rows(options: Options, snapshot: Snapshot) -> None:
    one, two = options(out=options().out + "1", seed=7), options(seed=7, data_seed=7)
    several = vary(options(out=options().out + "3"), seed=(7, 8))
    for config in (one, two, several):
        fit(config)
    assert snapshot(Path(one.out)) == snapshot(Path(two.out))
    records = [read_run(Path(config.out)) for config in (one, two, several)]
    assert records[0].plan == records[1].plan == records[2].plan
    assert {record.held_out for record in records} == {records[0].held_out}
    other = options(seed=7, data_seed=8, out=options().out + "4")
    fit(other)
    assert read_run(Path(other.out)).plan.seed == 8


def test_a_resumed_grid_ends_in_the_same_bytes(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at = 7
    whole = vary(options(out=options().out + "-whole", save_every=5), **AXES_OF_TEN)
    stopped = dataclasses.replace(whole, out=options().out)
    fit(whole)
    real = saetrain.training.step.train_step

    def step(trainer: Any, rows: Any, number: int) -> None:
        if number == stop_at and trainer.entry.name == "layers.1/k3-adam-lr2e-3":
            raise Killed
        real(trainer, rows, number)

    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.step, "train_step", step)
        with pytest.raises(Killed):
            fit(stopped)
    assert fit(dataclasses.replace(stopped, resume=True)).new_steps == 12 - stop_at // 5 * 5
    assert snapshot(Path(whole.out)) == snapshot(Path(stopped.out))


def test_resuming_with_another_grid_is_rejected(options: Options) -> None:
    config = vary(options(resume=True), k=(3, 4), seed=(0, 1))
    fit(config)
    with pytest.raises(RunError, match=r"--k: \[3, 4\] then, \[3, 5\] now") as caught:
        fit(vary(options(resume=True), k=(3, 5), seed=(0, 1)))
    assert "--seed" not in str(caught.value)
    with pytest.raises(RunError, match=r"--k: \[3, 4\] then, 3 now(.|\n)*--seed: \[0, 1\] then, 0"):
        fit(options(resume=True))
    with pytest.raises(RunError, match="other combinations"):
        fit(dataclasses.replace(config, saes=config.saes[:1] + config.saes[2:]))
    with pytest.raises(RunError, match=r"--hookpoints: \{\} then, .*Override\(k=2"):
        fit(dataclasses.replace(config, hookpoints={"layers.0": HookpointOverride(k=2)}))


def test_run_json_lists_the_saes_and_older_files_without_the_list_are_read(
    options: Options,
) -> None:
    config = vary(options(optimizer="adam", auxk_alpha=0.5), k=(3, 4))
    fit(config)
    path = Path(config.out) / RUN
    obj = json.loads(path.read_text())
    assert [(sae["setting"], sae["options"]["k"]) for sae in obj["saes"][:2]] == [
        ("k3", 3),
        ("k4", 4),
    ]
    obj["options"]["saes"], obj["saes"] = [], obj["saes"][::2]
    for name in ("saes", "hookpoints", "data_seed"):
        del obj["options"][name]
    for sae in obj["saes"]:
        del sae["setting"], sae["options"]
    del obj["seal"]
    path.write_text(json.dumps(obj | {"format_version": 1}))
    old = read_run(Path(config.out)).saes[0]
    assert old.name == "layers.0"
    assert (old.options.optimizer, old.options.auxk_alpha) == ("adam", 0.5)


def test_sparsify_loads_all_saes_of_a_hookpoint(options: Options, sparsify: ModuleType) -> None:
    config = vary(options(hookpoint=("layers.1",)), k=(3, 4))
    fit(config)
    loaded = sparsify.SparseCoder.load_many(f"{config.out}/layers.1", local=True)
    assert {name: sae.cfg.k for name, sae in loaded.items()} == {"k3": 3, "k4": 4}


def test_every_sae_of_a_grid_is_summarised_and_evaluated_under_its_name(options: Options) -> None:
    config = vary(options(), num_latents=(32, 48), k=(3, 4))
    summary = fit(config)
    names = [entry.name for entry in read_run(Path(config.out)).saes]
    assert list(summary.saes) == names
    assert len(names) == 8
    evaluation = evaluate(Path(config.out))
    assert [sae.name for sae in evaluation.saes] == names
    for name, sae in zip(names, evaluation.saes, strict=True):
        assert name == f"{sae.hookpoint}/latents{sae.num_latents}-k{sae.k}"
        alone = options(
            hookpoint=(sae.hookpoint,), num_latents=sae.num_latents, k=sae.k, out=f"{config.out}-1"
        )
        fit(dataclasses.replace(alone, resume=True, out=f"{config.out}-{name.replace('/', '-')}"))
        (single,) = evaluate(Path(f"{config.out}-{name.replace('/', '-')}")).saes
        assert dataclasses.replace(sae, name=sae.hookpoint) == single


# --- one read, one copy --------------------------------------------------------------------------


def bytes_read(config: FitConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    read, real = [], Cache.read_views

    def counted(self: Cache, hookpoint: str, shard: int, start: int, views: Any, *how: Any) -> None:
        read.append(sum(len(view) for places in views.values() for view in places))
        real(self, hookpoint, shard, start, views, *how)

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "read_views", counted)
        fit(config)
    return sum(read)


def test_many_saes_read_the_rows_once(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    one = options(verify="never", out=options().out + "1")
    many = vary(options(verify="never"), k=(3, 4, 5, 6), seed=(0, 1))
    once = 3 * 128 * 2 * 16 * 4  # rows of the training shards at two hookpoints
    held_out = once // 3
    for config in (one, many):  # and some of the next epoch, ahead of a run that then ends
        assert once + held_out <= bytes_read(config, monkeypatch) <= 2 * once + held_out


class Conversions(TorchDispatchMode):
    """Count copies of batches to another dtype or device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.bfloat16:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2, 3)])
def test_rows_are_copied_to_the_device_once_per_batch_and_hookpoint(
    make_cache: Callable[..., Path],
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
    seeds: tuple[int, ...],
) -> None:
    config = vary(options(cache=str(make_cache(dtype="bfloat16"))), seed=seeds)
    real, counts = saetrain.training.loop.train_batch, []

    def counted(*arguments: Any) -> None:
        with Conversions() as conversions:
            real(*arguments)
        counts.append(conversions.count)

    monkeypatch.setattr(saetrain.training.loop, "train_batch", counted)
    fit(config)
    assert counts == [2] * 12


def test_each_sae_of_a_grid_has_its_own_recipe(options: Options) -> None:
    axes = {"decoder_norm": ("unit", "fold", "free"), "k_anneal_steps": (0, 6)}
    config = vary(options(optimizer="adam", hookpoint=("layers.1",), grad_acc_steps=2), **axes)
    fit(config)
    for entry in read_run(Path(config.out)).saes:
        single = dataclasses.replace(config.of(entry.options), out=f"{config.out}-{entry.setting}")
        fit(single)
        expected = (Path(single.out) / "layers.1" / "sae.safetensors").read_bytes()
        assert (Path(config.out) / entry.name / "sae.safetensors").read_bytes() == expected
