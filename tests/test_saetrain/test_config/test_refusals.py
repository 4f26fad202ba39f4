"""Validation of `FitConfig` and `SaeConfig`, before any file is read."""

from __future__ import annotations

from typing import Any

import pytest

from actcache.errors import ConfigError
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeConfig, SaeOptions


@pytest.mark.parametrize("sizes", [(0, 8, 2), (4, 0, 2), (4, 8, 0), (-4, 8, 2)])
def test_an_sae_without_positive_sizes_is_rejected(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="sizes are out of range"):
        SaeConfig(*sizes)


def test_k_is_at_most_the_number_of_latents() -> None:
    assert SaeConfig(4, 8, 8).k == 8
    with pytest.raises(ConfigError, match=r"--k is larger(.|\n)*<= 8(.|\n)*9"):
        SaeConfig(4, 8, 9)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("expansion_factor", 0),
        ("num_latents", 0),
        ("k", 0),
        ("batch_size", 0),
        ("epochs", 0),
        ("max_tokens", 0),
        ("dead_after", 0),
        ("segment_shards", 0),
        ("buffer_bytes", 0),
        ("pool_rows", 0),
        ("save_every", 0),
        ("log_every", -1),
        ("lr", 0.0),
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("auxk_alpha", -0.1),
        ("auxk_alpha", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
        ("lr_warmup_steps", -1),
        ("lr_decay_steps", 0),
        ("lr_end", -0.1),
        ("lr_end", 1.1),
        ("lr_end", float("nan")),
        ("grad_acc_steps", 0),
        ("micro_batch_size", 0),
        ("chunk_latents", 0),
        ("k_anneal_steps", -1),
        ("k_start", 0),
    ],
)
def test_the_error_for_a_value_out_of_range_names_the_option(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match="--" + option.replace("_", "-")):
        FitConfig("cache", "run", **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_decay_steps": 9}, "--lr-decay-steps needs --lr-schedule stable-then-decay"),
        ({"lr_end": 0.1, "optimizer": "signum"}, "--lr-end needs a learning rate that decays"),
        ({"lr_end": 0.1, "lr_schedule": "constant"}, "--lr-end needs a learning rate that decays"),
        ({"weight_decay": 0.1, "optimizer": "adam"}, "--weight-decay needs adamw or muon"),
        ({"weight_decay": -0.1, "optimizer": "adamw"}, "--weight-decay is out of range"),
        ({"grad_clip": 0.0, "optimizer": "adam"}, "--grad-clip is out of range"),
        ({"grad_clip": 1.0, "optimizer": "signum"}, "--grad-clip has no effect on signum"),
        ({"k_start": 64}, "--k-start needs --k-anneal-steps"),
        ({"k_start": 16, "k_anneal_steps": 5}, "--k-start is smaller than --k"),
    ],
)
def test_contradictory_optimiser_options_are_rejected(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FitConfig("cache", "run", **options)


def test_buffer_bytes_and_pool_rows_are_mutually_exclusive() -> None:
    with pytest.raises(ConfigError, match="--buffer-bytes and --pool-rows"):
        FitConfig("cache", "run", buffer_bytes=2**30, pool_rows=64)


def test_segment_shards_needs_follow_and_training_rows_in_each_segment() -> None:
    with pytest.raises(ConfigError, match=r"--segment-shards needs --follow"):
        FitConfig("cache", "run", segment_shards=4)
    with pytest.raises(ConfigError, match=r"held out(.|\n)*>= 2, or --val-fraction 0"):
        FitConfig("cache", "run", follow=True, segment_shards=1)
    FitConfig("cache", "run", follow=True, segment_shards=1, val_fraction=0.0)


INVALID_RUNS = [
    ({"activation": "topk", "sparsity": 0.1}, r"no penalty(.|\n)*jumprelu \| relu \| gated"),
    (
        {"activation": "batchtopk", "sparsity_warmup_steps": 9},
        r"no penalty(.|\n)*no --sparsity-warmup-steps(.|\n)*9",
    ),
    ({"activation": "relu", "sparsity": -0.1}, "--sparsity is out of range"),
    ({"activation": "relu", "threshold": 0.1}, "--threshold needs --activation jumprelu"),
    ({"bandwidth": 0.1}, "--bandwidth needs --activation jumprelu"),
    (
        {"activation": "relu", "sparsity_warmup_steps": -1},
        "--sparsity-warmup-steps is out of range",
    ),
    ({"skip_connection": True}, r"copy its input(.|\n)*add --transcode"),
    ({"crosscode": True, "transcode": True}, "mutually exclusive"),
    ({"activation": "relu", "k_anneal_steps": 5}, r"has no k(.|\n)*topk \| batchtopk"),
    ({"activation": "groupmax", "k_anneal_steps": 5}, r"divides latents into k groups"),
    (
        {"activation": "batchtopk", "batch_size": 64, "micro_batch_size": 63},
        r"splits the batch(.|\n)*>= --batch-size 64(.|\n)*--grad-acc-steps",
    ),
    ({"activation": "groupmax", "chunk_latents": 64}, r"--chunk-latents needs(.|\n)*groupmax"),
    ({"compile": True}, r"--compile needs --activation jumprelu or gated(.|\n)*topk"),
    ({"cuda_graphs": True, "device": "cpu"}, r"--cuda-graphs needs a CUDA device(.|\n)*omit"),
    ({"cuda_graphs": True, "device": "mps:0"}, r"--cuda-graphs needs a CUDA device(.|\n)*mps:0"),
    ({"cuda_graphs": True, "optimizer": "muon"}, r"--cuda-graphs(.|\n)*signum \| adam \| adamw"),
    ({"cuda_graphs": True, "optimizer": "adam8bit"}, r"--cuda-graphs captures fused optimisers"),
    (
        {"cuda_graphs": True, "saes": (SaeOptions(), SaeOptions(optimizer="muon"))},
        r"--cuda-graphs captures fused optimisers(.|\n)*muon",
    ),
    ({"cuda_graphs": True, "grad_acc_steps": 2}, r"--cuda-graphs(.|\n)*--grad-acc-steps 1"),
    ({"cuda_graphs": True, "parallel": "ddp"}, r"--cuda-graphs(.|\n)*--parallel modules"),
    ({"transcode": True, "decoder_norm": "fold"}, r"begin at 0(.|\n)*rows are free"),
    (
        {
            "saes": (SaeOptions(), SaeOptions(activation="batchtopk")),
            "batch_size": 64,
            "micro_batch_size": 63,
        },
        "splits the batch",
    ),
]


@pytest.mark.parametrize(("options", "message"), INVALID_RUNS, ids=str)
def test_an_invalid_combination_of_run_options_is_rejected(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FitConfig("cache", "run", **options)


def test_batchtopk_accepts_a_micro_batch_of_the_whole_batch() -> None:
    FitConfig("cache", "run", activation="batchtopk", batch_size=64, micro_batch_size=64)


INVALID_SAES = [
    ({"activation": "groupmax"}, "divisible by --k 3"),
    ({"activation": "batchtopk", "multi_topk": True}, "--multi-topk needs"),
    ({"matryoshka": (8,)}, "1 to 7"),
    ({"matryoshka": (0, 4)}, "ascending"),
    ({"matryoshka": (4, 4)}, "ascending"),
    ({"matryoshka": (4,), "multi_topk": True}, "one of them"),
    ({"widths": (1, 2)}, "a crosscoder reads and predicts"),
    ({"widths": (1, 3), "transcode": True}, "a crosscoder reads and predicts"),
    ({"d_out": 5}, "as wide as its input"),
    ({"d_out": 0, "transcode": True}, "must be positive"),
    ({"sparsity": float("nan")}, "--sparsity"),
    ({"threshold": -1.0}, "--threshold"),
    ({"bandwidth": 0.0}, "--bandwidth"),
]


@pytest.mark.parametrize(("kind", "message"), INVALID_SAES, ids=str)
def test_an_invalid_sae_is_rejected(kind: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SaeConfig(4, 8, 3, **kind)


def test_k_is_unused_by_activations_with_a_penalty() -> None:
    assert SaeConfig(4, 8, 32, activation="relu").k == 32
