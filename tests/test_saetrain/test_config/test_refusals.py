"""What is refused before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

from actcache.errors import ConfigError
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeConfig
from saetrain.config.sae_options import SaeOptions


@pytest.mark.parametrize("sizes", [(0, 8, 2), (4, 0, 2), (4, 8, 0), (-4, 8, 2)])
def test_an_sae_without_positive_sizes_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        SaeConfig(*sizes)


def test_k_may_be_all_latents_and_no_more() -> None:
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
def test_a_number_that_no_run_can_carry_out_is_refused_by_its_option(
    option: str, value: float
) -> None:
    with pytest.raises(ConfigError, match="--" + option.replace("_", "-")):
        FitConfig("cache", "run", **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_decay_steps": 9}, "--lr-decay-steps is for --lr-schedule stable-then-decay"),
        ({"lr_end": 0.1, "optimizer": "signum"}, "--lr-end is for a learning rate that falls"),
        ({"lr_end": 0.1, "lr_schedule": "constant"}, "--lr-end is for a learning rate that falls"),
        ({"weight_decay": 0.1, "optimizer": "adam"}, "--weight-decay is for adamw and muon"),
        ({"weight_decay": -0.1, "optimizer": "adamw"}, "--weight-decay is out of range"),
        ({"grad_clip": 0.0, "optimizer": "adam"}, "--grad-clip is out of range"),
        ({"grad_clip": 1.0, "optimizer": "signum"}, "--grad-clip does nothing for signum"),
        ({"k_start": 64}, "--k-start is for a run with --k-anneal-steps"),
        ({"k_start": 16, "k_anneal_steps": 5}, "--k-start is smaller than --k"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FitConfig("cache", "run", **options)


def test_memory_and_rows_are_not_given_both() -> None:
    with pytest.raises(ConfigError, match="--buffer-bytes and --pool-rows"):
        FitConfig("cache", "run", buffer_bytes=2**30, pool_rows=64)


def test_segments_are_for_runs_that_follow_and_one_shard_is_none() -> None:
    with pytest.raises(ConfigError, match=r"--segment-shards is for a run with --follow"):
        FitConfig("cache", "run", segment_shards=4)
    with pytest.raises(ConfigError, match=r"held out(.|\n)*>= 2, or --val-fraction 0"):
        FitConfig("cache", "run", follow=True, segment_shards=1)
    FitConfig("cache", "run", follow=True, segment_shards=1, val_fraction=0.0)


IMPOSSIBLE = [
    ({"activation": "topk", "sparsity": 0.1}, r"no penalty(.|\n)*jumprelu \| relu \| gated"),
    (
        {"activation": "batchtopk", "sparsity_warmup_steps": 9},
        r"no penalty(.|\n)*no --sparsity-warmup-steps(.|\n)*9",
    ),
    ({"activation": "relu", "sparsity": -0.1}, "--sparsity is out of range"),
    ({"activation": "relu", "threshold": 0.1}, "--threshold is for --activation jumprelu"),
    ({"bandwidth": 0.1}, "--bandwidth is for --activation jumprelu"),
    ({"activation": "relu", "sparsity_warmup_steps": -1}, "--sparsity-warmup-steps is negative"),
    ({"skip_connection": True}, r"copy its input(.|\n)*add --transcode"),
    ({"crosscode": True, "transcode": True}, "two kinds"),
    ({"activation": "relu", "k_anneal_steps": 5}, r"has no k(.|\n)*topk \| batchtopk"),
    ({"activation": "groupmax", "k_anneal_steps": 5}, r"has groups that --k makes"),
    (
        {"activation": "batchtopk", "batch_size": 64, "micro_batch_size": 63},
        r"cuts the batch(.|\n)*>= --batch-size 64(.|\n)*--grad-acc-steps",
    ),
    ({"activation": "groupmax", "chunk_latents": 64}, r"--chunk-latents is for(.|\n)*groupmax"),
    ({"compile": True}, r"--compile is for --activation jumprelu and gated(.|\n)*topk"),
    ({"cuda_graphs": True, "device": "cpu"}, r"--cuda-graphs needs a CUDA device(.|\n)*leave it"),
    ({"cuda_graphs": True, "device": "mps:0"}, r"--cuda-graphs needs a CUDA device(.|\n)*mps:0"),
    ({"cuda_graphs": True, "optimizer": "muon"}, r"--cuda-graphs(.|\n)*signum \| adam \| adamw"),
    ({"cuda_graphs": True, "optimizer": "adam8bit"}, r"--cuda-graphs records updates of one pass"),
    (
        {"cuda_graphs": True, "saes": (SaeOptions(), SaeOptions(optimizer="muon"))},
        r"--cuda-graphs records updates of one pass(.|\n)*muon",
    ),
    ({"cuda_graphs": True, "grad_acc_steps": 2}, r"--cuda-graphs(.|\n)*--grad-acc-steps 1"),
    ({"cuda_graphs": True, "parallel": "ddp"}, r"--cuda-graphs(.|\n)*--parallel modules"),
    ({"transcode": True, "decoder_norm": "fold"}, r"begin at zero(.|\n)*rows are free"),
    (
        {
            "saes": (SaeOptions(), SaeOptions(activation="batchtopk")),
            "batch_size": 64,
            "micro_batch_size": 63,
        },
        "cuts the batch",
    ),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE, ids=str)
def test_a_kind_of_run_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitConfig("cache", "run", **options)


def test_a_micro_batch_that_is_the_whole_batch_is_one_that_batchtopk_can_choose_among() -> None:
    FitConfig("cache", "run", activation="batchtopk", batch_size=64, micro_batch_size=64)


IMPOSSIBLE_SAES = [
    ({"activation": "groupmax"}, "--k 3 divides"),
    ({"activation": "batchtopk", "multi_topk": True}, "--multi-topk goes with"),
    ({"matryoshka": (8,)}, "1 to 7"),
    ({"matryoshka": (0, 4)}, "rising"),
    ({"matryoshka": (4, 4)}, "rising"),
    ({"matryoshka": (4,), "multi_topk": True}, "one of them"),
    ({"widths": (1, 2)}, "a crosscoder reads and predicts"),
    ({"widths": (1, 3), "transcode": True}, "a crosscoder reads and predicts"),
    ({"d_out": 5}, "as wide as its input"),
    ({"d_out": 0, "transcode": True}, "must be positive"),
    ({"sparsity": float("nan")}, "--sparsity"),
    ({"threshold": -1.0}, "--threshold"),
    ({"bandwidth": 0.0}, "--bandwidth"),
]


@pytest.mark.parametrize(("kind", "message"), IMPOSSIBLE_SAES, ids=str)
def test_a_kind_of_sae_that_cannot_be_is_refused(kind: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SaeConfig(4, 8, 3, **kind)


def test_k_says_nothing_where_a_penalty_makes_latents_sparse() -> None:
    assert SaeConfig(4, 8, 32, activation="relu").k == 32
