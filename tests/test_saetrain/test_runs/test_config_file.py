"""Options from TOML, YAML and run.json, and errors in them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache.core.json_codec import to_json
from actcache.errors import ConfigError, FormatError
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import FIELDS, grid, vary
from saetrain.config.sae import HookpointOverride
from saetrain.launch.run import fit
from saetrain.runs.config_file import make_config, merge, read_options
from saetrain.runs.record import read_run

Options = Callable[..., FitConfig]

TOML = """
cache = "c"
out = "r"
hookpoint = ["layers.0", "layers.1*"]
k = [16, 32]
lr = 1e-3
batch-size = 512
val_fraction = 0
follow = true

[hookpoints."layers.1*"]
k = 64
num-latents = 4096
"""

YAML = """
cache: c
out: r
hookpoint: [layers.0, "layers.1*"]
k: [16, 32]
lr: 1e-3
batch-size: 512
val_fraction: 0
follow: true
max-tokens: null
hookpoints:
  layers.1*: {k: 64, num-latents: 4096}
"""


def written(folder: Path, text: str, suffix: str = ".toml") -> Path:
    path = folder / f"fit{suffix}"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("text", "suffix"), [(TOML, ".toml"), (YAML, ".yaml"), (YAML, ".yml")])
def test_toml_and_yaml_give_the_same_options(tmp_path: Path, text: str, suffix: str) -> None:
    config = make_config(read_options(written(tmp_path, text, suffix)))
    assert config == FitConfig(
        "c",
        "r",
        hookpoint=("layers.0", "layers.1*"),
        saes=grid(k=(16, 32), lr=1e-3),
        hookpoints={"layers.1*": HookpointOverride(k=64, num_latents=4096)},
        batch_size=512,
        val_fraction=0.0,
        follow=True,
    )
    assert isinstance(config.val_fraction, float)


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
@pytest.mark.parametrize("hyphens", [True, False])
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_every_option_of_the_command_line_can_be_given_in_a_file(
    tmp_path: Path, suffix: str, hyphens: bool, activation: str
) -> None:
    """With an activation that has the option: some lack k, some a penalty."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(FitConfig):
        if field.name not in ("saes", "hookpoints"):
            default = field.default
            values[field.name] = {int: 3, float: 0.5, bool: True}.get(type(default), "x")
    values |= {"wandb": "offline", "wandb_tags": ["c"], "parallel": "ddp"}
    values |= {"b_dec_init": "zeros", "input_scale": "unit", "encoder_scale": "0.5"}
    values |= {"hookpoint": ["a", "b"], "optimizer": "adamw", "verify": "always", "lr": 0.25}
    values |= {"lr_schedule": "stable-then-decay", "decoder_norm": "free"}
    values |= {"activation": activation, "crosscode": False}  # --transcode is given
    values |= {"weights_dtype": "bfloat16", "weight_decay": 0.25, "grad_clip": 0.25}
    for field in dataclasses.fields(FitConfig):
        if re.search(r"\bint\b", str(field.type)) and not isinstance(field.default, bool):
            values[field.name] = 3
    values["matryoshka"] = [3, 4]
    penalised = {"sparsity": 0.25, "threshold": 0.25, "bandwidth": 0.25}
    penalised |= {"sparsity_warmup_steps": 3}
    no_k = {"k_anneal_steps", "k_start", "chunk_latents"}
    # --cuda-graphs excludes --grad-acc-steps 3 and --parallel ddp.
    lacking = {"topk": {*penalised, "compile"}, "jumprelu": no_k}[activation] | {"cuda_graphs"}
    values |= penalised
    values |= {"beta1": 0.5, "beta2": 0.5, "eps": 0.5, "precision": "bfloat16", "defaults": 1}
    values |= {"auxk_alpha": 0.25}
    # --sparsity excludes --target-l0, and --follow --max-norm-ratio.
    lacking |= {"target_l0", "frequency_penalty", "max_norm_ratio"}
    # pool_rows excludes --buffer-bytes
    values = {name: v for name, v in values.items() if name not in {"pool_rows", *lacking}}

    def key(name: str) -> str:
        return name.replace("_", "-") if hyphens else name

    sign = " = " if suffix == ".toml" else ": "
    text = "".join(
        f"{key(name)}{sign}{str(v).lower() if isinstance(v, bool) else repr(v)}\n"
        for name, v in values.items()
    )
    config = make_config(read_options(written(tmp_path, text, suffix)))
    expected = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    assert config == FitConfig(**expected)
    assert all(getattr(config, name) == value for name, value in expected.items())


def test_cuda_graphs_can_be_given_in_a_file(tmp_path: Path) -> None:
    text = "cache = 'a'\nout = 'b'\ncuda-graphs = true\n"
    assert make_config(read_options(written(tmp_path, text, ".toml"))).cuda_graphs


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("bacth-size = 3", ".toml", r"unknown key(.|\n)*bacth-size(.|\n)*perhaps batch-size"),
        ("seeds: 3", ".yaml", "perhaps seed"),
        ("saes = []", ".toml", "unknown key"),
        ("[hookpoints.'a']\nlatents = 4", ".toml", r"'a' has an unknown key(.|\n)*num-latents"),
        ("[hookpoints.'a']\nseed = 4", ".toml", "unknown key"),
        ("[hookpoints.'a']\nk = 'x'", ".toml", r"'a': k has another type"),
        ("[hookpoints.'a']\nk = [1, 2]", ".toml", r"'a': k has another type"),
        ("[hookpoints.'a']\nnum-latents = 3\nexpansion-factor = 4", ".toml", "mutually exclusive"),
        ("hookpoints = 3", ".toml", "is not a table"),
        ("hookpoints: {a: 3}", ".yaml", "is not a table"),
        ("k = 'x'", ".toml", r"fit\.toml: k has another type(.|\n)*int"),
        ("k = 1.5", ".toml", "another type"),
        ("k = true", ".toml", "another type"),
        ("batch-size = [1, 2]", ".toml", "another type"),
        ("lr = 'fast'", ".toml", "another type"),
        ("lr: nan", ".yaml", "another type"),
        ("lr = -1.0", ".toml", "--lr is out of range"),
        ("optimizer = 'sgd'", ".toml", r"unknown value(.|\n)*signum \| adam"),
        ("k = [32, 32]", ".toml", "--k needs distinct values"),
        ("k = []", ".toml", "--k needs distinct values"),
        ("batch-size = 3\nbatch_size = 3", ".toml", "twice"),
        ("k = 3\nk = 4", ".toml", "is damaged"),
        ("k: 3\nk: 4", ".yaml", r"is damaged(.|\n)*duplicate key k"),
        ("hookpoints: {a: {k: 3, k: 4}}", ".yaml", "duplicate key k"),
        ("k: [", ".yaml", "is damaged"),
        ("k = ", ".toml", "is damaged"),
        ("!!python/object/apply:os.system ['true']", ".yaml", "is damaged"),
        ("- k", ".yaml", "holds no mapping of options"),
        ("k: 3", ".ini", r"unknown file type(.|\n)*\.toml"),
        ("{", ".json", "is damaged"),
    ],
)
def test_an_error_in_a_file_names_its_place(
    tmp_path: Path, text: str, suffix: str, message: str
) -> None:
    path = written(tmp_path, text, suffix)
    with pytest.raises(ConfigError, match=message):
        make_config({"cache": "c", "out": "r"} | read_options(path))


def test_a_missing_file_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        read_options(tmp_path / "none.toml")


def test_options_missing_in_file_and_command_line_raise_an_error() -> None:
    with pytest.raises(ConfigError, match="CACHE is missing"):
        make_config({"out": "r"})
    with pytest.raises(ConfigError, match="--out is missing"):
        make_config({"cache": "c"})


def test_an_empty_file_gives_no_options(tmp_path: Path) -> None:
    assert read_options(written(tmp_path, "", ".yaml")) == {}
    assert read_options(written(tmp_path, "", ".toml")) == {}


def test_the_command_line_wins_over_lists_and_hookpoint_overrides() -> None:
    overrides = {
        "a": HookpointOverride(k=2, lr=0.5),
        "b": HookpointOverride(num_latents=4),
        "c": HookpointOverride(k=3),
    }
    file = {"k": [1, 2], "lr": 0.1, "batch_size": 8, "hookpoints": overrides}
    merged = merge(file, {"k": 5, "batch_size": 4})
    assert merged == {
        "k": 5,
        "lr": 0.1,
        "batch_size": 4,
        "hookpoints": {"a": HookpointOverride(lr=0.5), "b": HookpointOverride(num_latents=4)},
    }
    assert merge(file, {"expansion_factor": 2})["hookpoints"].keys() == {"a", "c"}


@pytest.mark.parametrize(
    ("given", "replaced"),
    [
        ("expansion_factor", "num_latents"),
        ("num_latents", "expansion_factor"),
        ("epochs", "max_tokens"),
        ("buffer_bytes", "pool_rows"),
        ("pool_rows", "buffer_bytes"),
    ],
)
def test_an_option_of_the_command_line_replaces_its_alternative_in_the_file(
    given: str, replaced: str
) -> None:
    assert merge({replaced: 64, given: 32}, {given: 8}) == {given: 8, "hookpoints": {}}


def test_run_json_gives_the_options_of_the_run(options: Options, tmp_path: Path) -> None:
    overrides = {"layers.1": HookpointOverride(k=4)}
    config = dataclasses.replace(
        vary(options(resume=True), lr=(0.01, 0.002), seed=(0, 1)), hookpoints=overrides
    )
    fit(config)
    path = Path(config.out) / "run.json"
    read = make_config(read_options(path))
    assert read == dataclasses.replace(config, resume=False)
    assert fit(dataclasses.replace(read, resume=True)).new_steps == 0
    other = make_config(merge(read_options(path), {"out": str(tmp_path / "other")}))
    fit(other)
    assert read_run(Path(other.out)).saes == read_run(Path(config.out)).saes
    run = json.loads(path.read_text())
    path.write_bytes(to_json({key.replace("steps", "stops"): run[key] for key in run}, sealed=True))
    with pytest.raises(FormatError, match="other keys"):
        read_options(path)


def test_run_json_of_saes_that_are_no_grid_raises_an_error(options: Options) -> None:
    config = vary(options(), k=(3, 4), seed=(0, 1))
    fit(dataclasses.replace(config, saes=config.saes[:3]))
    with pytest.raises(ConfigError, match="not every combination"):
        read_options(Path(config.out) / "run.json")


def test_json_objects_of_options_are_read(tmp_path: Path) -> None:
    assert read_options(written(tmp_path, '{"batch-size": 4}', ".json")) == {"batch_size": 4}
    assert set(FIELDS) < {field.name for field in dataclasses.fields(FitConfig)}
