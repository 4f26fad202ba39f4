"""Validation of `FitConfig` and `SaeConfig`, before any file is read."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from actcache.config import ConvertConfig, HarvestConfig, PlanConfig
from actcache.core.json_codec import parse_dataclass, to_json
from actcache.core.options import option_name
from actcache.errors import ConfigError
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import HookpointOverride, SaeConfig, SaeOptions


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
        ("defaults", 3),
        ("max_norm_ratio", 1.5),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
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
    ({"d_out": 0, "transcode": True}, "out of range"),
    ({"sparsity": float("nan")}, "sparsity is out of range"),
    ({"threshold": -1.0}, "--threshold"),
    ({"bandwidth": 0.0}, "--bandwidth"),
]


@pytest.mark.parametrize(("kind", "message"), INVALID_SAES, ids=str)
def test_an_invalid_sae_is_rejected(kind: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SaeConfig(4, 8, 3, **kind)


def test_k_is_unused_by_activations_with_a_penalty() -> None:
    assert SaeConfig(4, 8, 32, activation="relu").k == 32


CONFIGURATIONS: list[tuple[type[Any], dict[str, Any]]] = [
    (FitConfig, {"cache": "cache", "out": "run"}),
    (SaeOptions, {}),
    (SaeConfig, {"d_in": 8, "num_latents": 16, "k": 2}),
    (HookpointOverride, {}),
    (HarvestConfig, {"model": "model", "dataset": "text", "out": "cache"}),
    (PlanConfig, {"model": "model", "dataset": "text"}),
    (ConvertConfig, {"source": "cache", "out": "copy"}),
]

VALUES: list[Any] = [
    -1, 0, 1, 5.0, 1e308, math.nan, math.inf, 10**18, 10**400, 10**5000, "", "x", "٣", "a\0b",
    None, True, b"x", object(), [], (), {}, [1], ["x"], [[[]]], {"x": 1}, "-1", Path("x"),
    np.int64(3), np.float32(0.5), np.float64("nan"), np.str_("y"), (SaeOptions(),),
    {"x": HookpointOverride(k=2)},
]  # fmt: skip


@pytest.mark.parametrize(("cls", "given"), CONFIGURATIONS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_field_refuses_what_could_not_be_read_back_from_json(
    cls: type[Any], given: dict[str, Any]
) -> None:
    accepted = trials = 0
    for field, value in itertools.product(dataclasses.fields(cls), VALUES):
        trials += 1
        try:
            config = cls(**{**given, field.name: value})
        except ConfigError:
            continue
        accepted += 1
        assert parse_dataclass(cls, json.loads(to_json(config)), "file") == config
    assert trials == len(dataclasses.fields(cls)) * len(VALUES)
    assert 0 < accepted < trials / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_norm": "Unit"}, "--decoder-norm has an unknown value\n.*unit | fold | free"),
        ({"lr_schedule": "Cosine"}, "--lr-schedule has an unknown value"),
        ({"weights_dtype": "x"}, "--weights-dtype has an unknown value"),
        ({"save_every": 5.0}, "--save-every has another type\n.*an integer\n.*5.0"),
        ({"seed": True}, "--seed has another type"),
        ({"lr": "1e-3"}, "--lr has another type\n.*a number\n.*'1e-3'"),
        ({"lr": math.nan}, "--lr is out of range"),
        ({"wandb_notes": 5}, "--wandb-notes has another type\n.*a text"),
        ({"hookpoint": ["a", 3]}, r"--hookpoint\[1\] has another type"),
        ({"cache": 5}, "CACHE has another type"),
        ({"cache": "a\0b"}, "CACHE holds a NUL character"),
        ({"saes": ["x"]}, r"saes\[0\] has another type\n.*SaeOptions"),
        ({"hookpoints": {"a": {"k": 1}}}, r"hookpoints\['a'\] has another type"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitConfig(**({"cache": "cache", "out": "run"} | options))


def options_of_choices() -> Iterator[Any]:
    """List every option with a set of choices: class, other arguments, field, choices."""
    for cls, given in CONFIGURATIONS:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            kinds = [hint, *get_args(hint)]
            kinds += [inner for kind in get_args(hint) for inner in get_args(kind)]
            for kind in kinds:
                if get_origin(kind) is Literal:
                    name = f"{cls.__name__}.{field.name}"
                    yield pytest.param(cls, given, field, get_args(kind), id=name)


@pytest.mark.parametrize(("cls", "given", "field", "choices"), list(options_of_choices()))
def test_an_unknown_choice_is_refused_on_construction_with_the_field_and_its_values(
    cls: type[Any], given: dict[str, Any], field: Any, choices: tuple[str, ...]
) -> None:
    shown = option_name(field)
    for value in ("bogus", choices[0] + choices[0][-1], choices[0].upper(), ""):
        with pytest.raises(ConfigError) as error:
            cls(**{**given, field.name: value})
        assert error.value.what.startswith(shown), error.value
        assert error.value.what.endswith("has an unknown value"), error.value
        for choice in choices:
            assert choice in error.value.expected, error.value
    for value in choices:
        try:
            cls(**{**given, field.name: value})
        except ConfigError as error:  # with other options only, such as --lr-decay-steps
            assert "unknown value" not in error.what  # noqa: PT017


LISTS: list[tuple[type[Any], dict[str, Any], dict[str, Any]]] = [
    (cls, given, {name: items[name]})
    for cls, given in CONFIGURATIONS
    for items in [
        {
            "hookpoint": "layers.0", "saes": SaeOptions(k=4), "wandb_tags": "a", "matryoshka": 8,
            "widths": 8, "layers": 9, "dataset_revision": "main", "mix": "b.jsonl",
            "weight": 0.5, "exclude_tokens": "<s>", "max_memory": "0=1GiB",
        }
    ]
    for name in (field.name for field in dataclasses.fields(cls))
    if get_origin(get_type_hints(cls)[name]) is tuple
]  # fmt: skip


@pytest.mark.parametrize(("cls", "given", "option"), LISTS)
def test_one_item_where_a_list_is_meant_is_a_list_of_one(
    cls: type[Any], given: dict[str, Any], option: dict[str, Any]
) -> None:
    ((name, item),) = option.items()
    beside = {"mix": "b.jsonl"} if name == "weight" else {}
    beside |= {"dataset": "org/name"} if name == "dataset_revision" else {}
    made = []
    for value in (item, [item], (item,)):
        try:
            made.append(cls(**{**given, **beside, name: value}))
        except ConfigError as error:
            made.append(str(error))
    assert made[0] == made[1] == made[2]
    if not isinstance(made[0], str):
        assert getattr(made[0], name) == (item,)


def test_an_item_of_another_type_is_refused_with_what_a_list_may_hold() -> None:
    for options, expected in (
        ({"matryoshka": "8"}, "--matryoshka has another type\n.*an integer \\| a list"),
        ({"saes": {"k": 4}}, "saes has another type\n.*SaeOptions \\| a list"),
        ({"hookpoint": None}, "--hookpoint has another type\n.*a text \\| a list"),
    ):
        with pytest.raises(ConfigError, match=expected):
            FitConfig("cache", "run", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("cls", "given"), CONFIGURATIONS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_path_means_its_text_in_every_option(cls: type[Any], given: dict[str, Any]) -> None:
    for name in (field.name for field in dataclasses.fields(cls)):
        made = []
        for value in ("some/where", Path("some/where")):
            try:
                made.append(cls(**{**given, name: value}))
            except ConfigError:
                made.append("refused")
        assert made[0] == made[1], name


def test_values_of_other_libraries_become_those_of_the_type_hints() -> None:
    config = FitConfig(
        cache=Path("cache"),  # type: ignore[arg-type]
        out="run",
        k=np.int64(4),  # type: ignore[arg-type]
        lr=np.float32(0.5),  # type: ignore[arg-type]
        hookpoint="layers.0",  # type: ignore[arg-type]
        matryoshka=[4, 8],  # type: ignore[arg-type]
        encoder_scale=2,  # type: ignore[arg-type]
    )
    plain = FitConfig(
        "cache", "run", ("layers.0",), k=4, lr=0.5, matryoshka=(4, 8), encoder_scale="2"
    )
    assert config == plain
    assert to_json(config) == to_json(plain)
    assert config.sae.k == 4


def test_an_override_refuses_numbers_out_of_range_when_it_is_made() -> None:
    for options in ({"k": 0}, {"lr": 1e31}, {"lr": 0.0}, {"num_latents": 2**31}):
        with pytest.raises(ConfigError, match="is out of range"):
            HookpointOverride(**options)  # type: ignore[arg-type]
