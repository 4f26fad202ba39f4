"""run.json: reading, writing, and checks on resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache.cache.reader import Cache
from actcache.core.json_codec import to_json
from actcache.errors import CacheMismatchError, FormatError, RunError
from actcache.stream.order import OrderPlan
from saetrain.config.fit_config import DEFAULTS, with_defaults
from saetrain.config.sae import HookpointOverride, SaeConfig, SaeEntry, SaeOptions
from saetrain.runs.record import (
    FORMAT_VERSION,
    RUN,
    RunRecord,
    check_same_cache,
    check_same_run,
    read_run,
    receipts_digest,
    write_run,
)

TRAINING, HELD_OUT = [1, 2], [0]


@pytest.fixture
def own_cache(cache_path: Path, tmp_path: Path) -> Path:
    """A private copy of the cache."""
    return shutil.copytree(cache_path, tmp_path / "cache")


@pytest.fixture
def record(own_cache: Path, options: Callable[..., Any]) -> RunRecord:
    """The record of a run that uses three of the cache's four shards."""
    cache = Cache.open(own_cache)
    return RunRecord(
        format_version=1,
        cache=str(own_cache),
        cache_id=cache.manifest.cache_id,
        receipts_digest=receipts_digest(cache, TRAINING, HELD_OUT),
        held_out=tuple(HELD_OUT),
        plan=OrderPlan(((1, 128), (2, 128)), 16, 32, 32, 8, 0),
        steps=8,
        dead_after=64,
        saes=(SaeEntry("layers.0", SaeConfig(16, 48, 3), 0.01, 0),),
        options=options(hookpoint=("layers.0",), num_latents=None),
        versions={"torch": "2"},
    )


def test_a_written_record_reads_back_equal(record: RunRecord, tmp_path: Path) -> None:
    write_run(tmp_path / "run", record)
    assert read_run(tmp_path / "run") == record


def test_a_record_is_sealed_from_format_2_on(record: RunRecord, tmp_path: Path) -> None:
    write_run(tmp_path, record)
    first = json.loads((tmp_path / RUN).read_text())
    assert "seal" not in first
    write_run(tmp_path, second := dataclasses.replace(record, format_version=FORMAT_VERSION))
    assert read_run(tmp_path) == second
    text = (tmp_path / RUN).read_bytes()
    for at in range(0, len(text), 7):
        flipped = bytearray(text)
        flipped[at] ^= 1 << at % 8
        (tmp_path / RUN).write_bytes(flipped)
        with pytest.raises(FormatError, match=r"run\.json"):
            read_run(tmp_path)
    for damaged in (to_json(first, sealed=True), to_json(first | {"format_version": 2})):
        (tmp_path / RUN).write_bytes(damaged)
        with pytest.raises(FormatError, match=r"run\.json"):
            read_run(tmp_path)


@pytest.mark.parametrize("path", ["missing", "file", "empty"])
def test_a_folder_without_a_run_raises_an_error_that_names_it(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=rf"{path} is not a run"):
        read_run(tmp_path / path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: "",
        lambda run: json.dumps(run)[:-40],
        lambda run: json.dumps([run]),
        lambda run: json.dumps({k: v for k, v in run.items() if k != "plan"}),
        lambda run: json.dumps(run | {"more": 1}),
        lambda run: json.dumps(run | {"steps": "8"}),
        lambda run: json.dumps(run | {"saes": [{"hookpoint": "layers.0"}]}),
        lambda run: json.dumps(run | {"format_version": 2}),
        lambda run: json.dumps(run | {"options": run["options"] | {"follow": True}}),
    ],
    ids=["empty", "cut", "list", "missing", "unknown", "type", "nested", "version", "segments"],
)
def test_a_damaged_record_raises_an_error(
    record: RunRecord, tmp_path: Path, damage: Callable[[dict[str, Any]], str]
) -> None:
    write_run(tmp_path, record)
    (tmp_path / RUN).write_text(damage(json.loads((tmp_path / RUN).read_text())))
    with pytest.raises(FormatError):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"hookpoint": "../outside/layers.0"},
        {"hookpoint": "/tmp"},
        {"hookpoint": ".."},
        {"hookpoint": ""},
        {"hookpoint": "layers.0/more"},
        {"hookpoint": "run.json"},
        {"setting": ".."},
        {"setting": "../k3"},
        {"setting": "a/b"},
        {"setting": "best-000000003"},
        {"setting": "cfg.json"},
        {"setting": "a\u0000b"},
        {"setting": "k" * 300},
        {"reads": ["../x"]},
        {"predicts": ["x/../y"]},
        {"lr": -0.1},
        {"scales": [0.0]},
        {"scales": [1.0, 1.0]},
        {"encoder_scale": -1.0},
        {"seed": -1},
    ],
    ids=str,
)
def test_names_that_are_no_folders_of_the_run_and_numbers_out_of_range_are_refused(
    record: RunRecord, tmp_path: Path, change: dict[str, Any]
) -> None:
    write_run(tmp_path, record)
    run = json.loads((tmp_path / RUN).read_text())
    run["saes"][0] |= change
    (tmp_path / RUN).write_text(json.dumps(run))
    with pytest.raises(FormatError, match=r"run\.json: "):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"dead_after": 0},
        {"batch_parts": 0},
        {"held_out": [1]},
        {"held_out": [0, 0]},
        {"held_out": [-1]},
        {"wandb_id": "../../x"},
        {"saes": []},
    ],
    ids=str,
)
def test_a_record_that_cannot_be_is_refused(
    record: RunRecord, tmp_path: Path, change: dict[str, Any]
) -> None:
    write_run(tmp_path, record)
    run = json.loads((tmp_path / RUN).read_text())
    (tmp_path / RUN).write_text(json.dumps(run | change))
    with pytest.raises(FormatError, match=r"run\.json"):
        read_run(tmp_path)


def test_two_saes_of_one_name_and_impossible_options_are_refused(
    record: RunRecord, tmp_path: Path
) -> None:
    write_run(tmp_path, record)
    run = json.loads((tmp_path / RUN).read_text())
    (tmp_path / RUN).write_text(json.dumps(run | {"saes": run["saes"] * 2}))
    with pytest.raises(FormatError, match="different names"):
        read_run(tmp_path)
    (tmp_path / RUN).write_text(json.dumps(run | {"options": run["options"] | {"k": 0}}))
    with pytest.raises(FormatError, match=r"run\.json holds options that cannot be: --k"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"plan": OrderPlan(((1, 128), (2, 127)), 16, 32, 32, 8, 0)},
        {"plan": OrderPlan(((1, 128), (2, 128)), 8, 32, 32, 8, 0)},
        {"plan": OrderPlan(((1, 128), (2, 128)), 16, 64, 64, 8, 0)},
        {"plan": OrderPlan(((1, 128), (2, 128)), 16, 32, 16, 8, 0)},
        {"plan": OrderPlan(((1, 128), (2, 128)), 16, 32, 32, 8, 1)},
        {"plan": OrderPlan(((0, 128), (2, 128)), 16, 32, 32, 8, 0), "held_out": (1,)},
        {"dead_after": 65},
        {"saes": (SaeEntry("layers.0", SaeConfig(17, 48, 3), 0.01, 0),)},
    ],
    ids=str,
)
def test_values_that_contradict_the_options_or_the_cache_are_refused(
    record: RunRecord, own_cache: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(FormatError, match="contradicts its own options"):
        check_same_cache(dataclasses.replace(record, **change), Cache.open(own_cache))


def test_a_moved_cache_with_more_shards_is_accepted(record: RunRecord, own_cache: Path) -> None:
    check_same_cache(record, Cache.open(own_cache.rename(own_cache.with_name("moved"))))


def test_another_cache_raises_an_error(record: RunRecord, make_cache: Callable[..., Path]) -> None:
    with pytest.raises(CacheMismatchError, match="not the cache of this run"):
        check_same_cache(record, Cache.open(make_cache(seed=1)))


@pytest.mark.parametrize("shard", TRAINING + HELD_OUT)
def test_a_changed_receipt_of_a_shard_in_use_raises_an_error(
    record: RunRecord, own_cache: Path, shard: int
) -> None:
    path = own_cache / "shards" / f"{shard:05d}.json"
    text = path.read_text().replace('"xxh3_128": "', '"xxh3_128": "0', 1)
    path.write_bytes(to_json(json.loads(text), sealed=True))
    with pytest.raises(CacheMismatchError, match="have changed since this run began"):
        check_same_cache(record, Cache.open(own_cache))


def test_a_changed_receipt_of_a_shard_not_in_use_is_accepted(
    record: RunRecord, own_cache: Path
) -> None:
    (own_cache / "shards" / "00003.json").unlink()
    check_same_cache(record, Cache.open(own_cache))


@pytest.mark.parametrize("shard", TRAINING + HELD_OUT)
def test_a_missing_shard_raises_an_error_that_names_it(
    record: RunRecord, own_cache: Path, shard: int
) -> None:
    (own_cache / "shards" / f"{shard:05d}.json").unlink()
    with pytest.raises(CacheMismatchError, match=rf"no longer holds(.|\n)*\[{shard}\]"):
        check_same_cache(record, Cache.open(own_cache))


FREE = {
    "parallel": "modules",
    "cache": "x",
    "out": "y",
    "resume": True,
    "device": "cuda",
    "save_every": 77,
    "keep_last": 3,
    "keep_every": 50,
    "force_config": True,
    "verify": "always",
    "block_cache": "z",
    "block_cache_bytes": 0,
    "wandb": "offline",
    "wandb_project": "a",
    "wandb_entity": "b",
    "wandb_group": "c",
    "wandb_tags": ("d",),
    "wandb_notes": "e",
    "wandb_per_sae": True,
    "wandb_log_final_artifact": True,
}
BINDING = {
    "hookpoint": ("layers.1",),
    "expansion_factor": 8,
    "num_latents": 96,
    "k": 4,
    "batch_size": 64,
    "epochs": 2,
    "max_tokens": 640,
    "optimizer": "adam",
    "lr": 0.02,
    "lr_schedule": "cosine",
    "lr_warmup_steps": 9,
    "lr_decay_steps": 3,
    "lr_end": 0.1,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "grad_acc_steps": 2,
    "micro_batch_size": 16,
    "chunk_latents": 40,
    "compile": True,
    "cuda_graphs": True,
    "autocast": True,
    "weights_dtype": "bfloat16",
    "decoder_norm": "fold",
    "b_dec_init": "zeros",
    "input_scale": "rms",
    "encoder_scale": "auto",
    "k_anneal_steps": 6,
    "k_start": 9,
    "auxk_alpha": 0.5,
    "dead_after": 65,
    "val_fraction": 0.2,
    "val_every": 5,
    "val_rows": 77,
    "save_best": True,
    "buffer_bytes": 2**30,
    "pool_rows": 64,
    "seed": 5,
    "data_seed": 5,
    "saes": (SaeOptions(num_latents=48, k=3, lr=0.01), SaeOptions(seed=1)),
    "hookpoints": {"layers.0": HookpointOverride(k=2)},
    "log_every": 5,
    "histogram_every": 3,
    "finetune": "u/r",
    "fresh_b_dec": True,
    "fresh_decoder": True,
    "follow": True,
    "segment_shards": 4,
    "activation": "relu",
    "sparsity": 0.5,
    "sparsity_warmup_steps": 7,
    "threshold": 0.2,
    "bandwidth": 0.3,
    "multi_topk": True,
    "matryoshka": (4, 8),
    "transcode": True,
    "skip_connection": True,
    "crosscode": True,
    "defaults": 2,
    "beta1": 0.8,
    "beta2": 0.95,
    "eps": 1e-6,
    "target_l0": 3.0,
    "frequency_penalty": 0.1,
    "precision": "bfloat16",
    "max_norm_ratio": 10.0,
}
NEEDS: dict[str, dict[str, Any]] = {
    "save_best": {"val_every": 5},
    "fresh_b_dec": {"finetune": "x"},
    "fresh_decoder": {"finetune": "x"},
    "segment_shards": {"follow": True},
    "lr_decay_steps": {"lr_schedule": "stable-then-decay"},
    "lr_end": {"lr_schedule": "linear"},
    "weight_decay": {"optimizer": "adamw"},
    "grad_clip": {"optimizer": "adam"},
    "k_start": {"k_anneal_steps": 5},
    "sparsity": {"activation": "relu"},
    "sparsity_warmup_steps": {"activation": "relu"},
    "threshold": {"activation": "jumprelu"},
    "bandwidth": {"activation": "jumprelu"},
    "target_l0": {"activation": "relu", "optimizer": "adam"},
    "frequency_penalty": {"activation": "jumprelu", "target_l0": 3.0, "optimizer": "adam"},
    "beta1": {"optimizer": "adam"},
    "beta2": {"optimizer": "adam"},
    "eps": {"optimizer": "adam"},
    "skip_connection": {"transcode": True},
    "compile": {"activation": "gated"},
    "cuda_graphs": {"device": "auto"},
}
"""Options that an option requires."""


def changed(record: RunRecord, **options: Any) -> RunRecord:
    return dataclasses.replace(record, options=dataclasses.replace(record.options, **options))


def test_every_option_is_either_free_or_binding(record: RunRecord) -> None:
    names = {field.name for field in dataclasses.fields(record.options)}
    assert names == FREE.keys() | BINDING.keys()


def test_a_run_of_an_earlier_format_keeps_the_defaults_of_version_1(record: RunRecord) -> None:
    old = dataclasses.replace(record, format_version=2)
    record = dataclasses.replace(record, format_version=3)
    assert (old.defaults_version, record.defaults_version) == (1, 2)
    assert (old.defaults, record.defaults) == (DEFAULTS[1], DEFAULTS[2])
    check_same_run(old, changed(old, defaults=1))
    with pytest.raises(RunError, match="--defaults: 1 then, 2 now"):
        check_same_run(old, changed(old, defaults=2))
    named = changed(record, defaults=1)
    assert named.defaults == DEFAULTS[1]
    with pytest.raises(RunError, match="--defaults: 1 then, 2 now"):
        check_same_run(named, changed(named, defaults=None))


def test_a_default_that_a_record_spells_out_is_the_same_option(record: RunRecord) -> None:
    old = changed(dataclasses.replace(record, format_version=2), input_scale="none")
    assert old.options.input_scale == "none"
    check_same_run(old, changed(old, input_scale=None))
    with pytest.raises(RunError, match="--input-scale: 'none' then, 'rms' now"):
        check_same_run(old, changed(old, input_scale="rms"))


def test_keys_that_formats_1_and_2_lack_are_left_out_while_they_are_unset(
    record: RunRecord,
) -> None:
    text = to_json(record).decode()
    for name in ("defaults", "precision", "eps", "target_l0", "norm_limits", "left_out_digest"):
        assert f'"{name}"' not in text
    assert '"eps"' in to_json(changed(record, optimizer="adam", eps=1e-9)).decode()


def test_options_that_do_not_affect_results_may_change(record: RunRecord) -> None:
    check_same_run(record, changed(record, **FREE))


@pytest.mark.parametrize("option", BINDING)
def test_every_other_change_raises_an_error_with_the_option_and_both_values(
    record: RunRecord, option: str
) -> None:
    if option == "saes":  # the error names the options that differ: tests of grids
        return
    record = changed(record, **NEEDS.get(option, {}))
    options = with_defaults(record.options, record.defaults_version)
    old, new = getattr(options, option), BINDING[option]
    with pytest.raises(RunError) as caught:
        check_same_run(record, changed(record, **{option: new}))
    assert f"--{option.replace('_', '-')}: {old!r} then, {new!r} now" in str(caught.value)
