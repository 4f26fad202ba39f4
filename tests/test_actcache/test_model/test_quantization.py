"""Quantised and offloaded weights, with the real libraries on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actcache.cache.reader import Cache
from actcache.config import HarvestConfig
from actcache.errors import CacheMismatchError, ConfigError, ModelError
from actcache.harvester.run import harvest
from actcache.model.hooks import ActivationCapture, choose, discover_sites, input_device
from actcache.model.loading import (
    dtype_name,
    fingerprint_model,
    from_pretrained_kwargs,
    load_config,
    load_model,
)

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # in bitsandbytes

IDS = torch.arange(42).reshape(2, 21)

PART = "cpu=120KB"
"""Memory for embeddings and one layer of `make_model`'s Llama of 170 kB; the rest is on disk."""


@pytest.fixture(scope="module")
def wide_model(make_model: Callable[..., Path]) -> Path:
    """Return a model of widths that bitsandbytes' CPU kernels support: multiples of 64."""
    return make_model(width=64, inner=128)


@pytest.fixture(scope="module")
def wild_model(wide_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with activations above 6, which LLM.int8 multiplies separately as outliers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("wild")
    model = AutoModelForCausalLM.from_pretrained(wide_model)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 4
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(wide_model).save_pretrained(folder)
    return folder


def loading(model: Path, **given: Any) -> HarvestConfig:
    return HarvestConfig(str(model), "data", "out", **given)


def kwargs_of(model: Path, **given: Any) -> dict[str, Any]:
    config = loading(model, **given)
    return from_pretrained_kwargs(config, load_config(config))


def captured(model: Any, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    sites = discover_sites(model)
    points, _ = choose(["layers.*", "layers.*:in", "norm"], sites, model)
    with ActivationCapture(model, points) as capture:
        return dict(capture.run(ids))


def devices(model: Any) -> set[str]:
    return {tensor.device.type for tensor in model.state_dict().values()}


def test_a_plain_load_has_no_extra_arguments(tiny_model: Path) -> None:
    assert kwargs_of(tiny_model) == {}


def test_4_bit_weights_are_nf4_and_compute_in_the_models_dtype(
    tiny_model: Path, make_model: Callable[..., Path]
) -> None:
    half = make_model(dtype="float16")
    for model, given, expected in (
        (tiny_model, {}, torch.float32),
        (tiny_model, {"model_dtype": "bfloat16"}, torch.bfloat16),
        (half, {}, torch.float16),
    ):
        kwargs = kwargs_of(model, load_in="4bit", device="cpu", **given)
        assert kwargs["device_map"] == {"": "cpu"}
        found = kwargs["quantization_config"]
        assert (found.load_in_4bit, found.bnb_4bit_quant_type) == (True, "nf4")
        assert found.bnb_4bit_compute_dtype == expected


def test_8_bit_weights_use_the_default_settings_of_transformers(tiny_model: Path) -> None:
    from transformers import BitsAndBytesConfig

    found = kwargs_of(tiny_model, load_in="8bit")["quantization_config"]
    assert found.to_dict() == BitsAndBytesConfig(load_in_8bit=True).to_dict()


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"load_in": "8bit"}, ("bitsandbytes", "accelerate")),
        ({"load_in": "4bit"}, ("bitsandbytes",)),
        ({"device_map": "auto"}, ("accelerate",)),
    ],
)
def test_a_missing_library_is_reported_with_its_pip_command(
    given: dict[str, Any],
    missing: tuple[str, ...],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name in missing else find(name)
    )
    option = f"--{next(iter(given)).replace('_', '-')} {next(iter(given.values()))}"
    with pytest.raises(ModelError) as caught:
        load_model(loading(tiny_model, **given))
    needs, remedy = " and ".join(missing), " ".join(missing)
    assert str(caught.value) == f"{option} needs {needs}\n  remedy:   pip install {remedy}"


@pytest.mark.parametrize(("load_in", "stored"), [("8bit", torch.int8), ("4bit", torch.uint8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_weights_have_their_own_fingerprint_and_the_same_dtype(
    load_in: Any, stored: torch.dtype, dtype: Any, wide_model: Path
) -> None:
    plain = load_model(loading(wide_model, model_dtype=dtype))
    model = load_model(loading(wide_model, model_dtype=dtype, load_in=load_in))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == stored
    assert dtype_name(model) == dtype
    assert not any(p.requires_grad for p in model.parameters())
    print_ = fingerprint_model(model)
    assert print_ != fingerprint_model(plain)
    near, exact = captured(model), captured(plain)
    assert set(near) == set(exact)
    for name, activations in near.items():
        assert activations.dtype == getattr(torch, dtype)
        error = (activations - exact[name]).float().norm() / exact[name].float().norm()
        assert error < (0.1 if load_in == "8bit" else 0.7)
    assert not torch.equal(near["layers.1"], exact["layers.1"])
    again = load_model(loading(wide_model, model_dtype=dtype, load_in=load_in))
    assert fingerprint_model(again) == print_
    assert all(torch.equal(captured(again)[name], near[name]) for name in near)


def test_8_and_4_bits_have_different_fingerprints(tiny_model: Path) -> None:
    models = [load_model(loading(tiny_model, load_in=bits)) for bits in ("8bit", "4bit")]
    assert len({*map(fingerprint_model, models)}) == 2


def test_an_8_bit_checkpoint_needs_load_in_8bit_and_is_never_quantised_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    for bits in ("8bit", "4bit"):
        model = load_model(loading(tiny_model, load_in=bits))
        model.save_pretrained(tmp_path / bits)
    with pytest.raises(ModelError, match=r"(?s)holds 8-bit weights.*remedy: +--load-in 8bit"):
        load_model(loading(tmp_path / "8bit"))
    loaded = load_model(loading(tmp_path / "8bit", load_in="8bit"))
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    for given in ("8bit", "4bit"):
        other = "4bit" if given == "8bit" else "8bit"
        message = rf"(?s)is quantised already.*--load-in none or {other}\n.*--load-in {given}"
        with pytest.raises(ModelError, match=message):
            load_model(loading(tmp_path / other, load_in=given))
    default = load_model(loading(tmp_path / "4bit", device="cpu"))
    assert default.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert dtype_name(default) == "float32"


def tie(folder: Path) -> Path:
    """Save the model of a folder again with its head tied to its embeddings."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=True)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("budget", "expected"),
    [((), {"cpu"}), ((PART,), {"cpu", "meta"}), (("cpu=1KB",), {"meta"})],
    ids=["memory", "memory and disk", "disk"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_model_gives_the_same_bits_as_the_plain_one(
    budget: tuple[str, ...],
    expected: set[str],
    tied: bool,
    tiny_model: Path,
    make_model: Callable[..., Path],
) -> None:
    folder = tie(make_model()) if tied else tiny_model
    plain = load_model(loading(folder, device="cpu"))
    model = load_model(loading(folder, device_map="auto", max_memory=budget))
    assert devices(model) == expected
    assert input_device(model).type == "cpu"
    assert dtype_name(model) == "float32"
    assert fingerprint_model(model) == fingerprint_model(plain)
    assert devices(model) == expected  # loaded weights were released again
    ours, theirs = captured(model), captured(plain)
    assert discover_sites(model) == discover_sites(plain)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert devices(model) == expected


def test_an_offloaded_model_may_have_another_dtype_and_stop_within_a_layer(
    tiny_model: Path,
) -> None:
    given = {"model_dtype": "bfloat16"}
    plain = load_model(loading(tiny_model, **given))
    model = load_model(loading(tiny_model, device_map="auto", max_memory=("cpu=60KB",), **given))
    assert "meta" in devices(model)
    assert dtype_name(model) == "bfloat16"
    assert fingerprint_model(model) == fingerprint_model(plain)
    points, _ = choose(["layers.1.mlp.up_proj"], discover_sites(plain), plain)
    for ids in (IDS, IDS.flip(0), IDS):
        with ActivationCapture(model, points) as ours, ActivationCapture(plain, points) as theirs:
            assert torch.equal(ours.run(ids)[points[0].name], theirs.run(ids)[points[0].name])


def test_weights_of_another_shape_than_in_the_checkpoint_need_an_offload_folder(
    tmp_path: Path,
) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_local_experts": 4}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads, **tokens)).save_pretrained(tmp_path / "m")
    given = {"device_map": "auto", "max_memory": ("cpu=1KB",)}
    with pytest.raises(ModelError, match=r"(?s)offload_folder.*remedy.*--offload-folder"):
        load_model(loading(tmp_path / "m", **given))
    plain = load_model(loading(tmp_path / "m"))
    model = load_model(loading(tmp_path / "m", offload_folder=str(tmp_path / "o"), **given))
    assert list((tmp_path / "o").iterdir())
    assert fingerprint_model(model) == fingerprint_model(plain)
    ours, theirs = captured(model), captured(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_quantised_model_that_does_not_fit_is_refused(tiny_model: Path) -> None:
    given = {"load_in": "4bit", "device_map": "auto", "max_memory": ("cpu=1KB",)}
    with pytest.raises(ModelError, match=r"(?s)cannot load the weights.*CPU or the disk"):
        load_model(loading(tiny_model, **given))


def test_a_quantised_model_that_fits_may_use_device_map_auto(tiny_model: Path) -> None:
    model = load_model(loading(tiny_model, load_in="8bit", device_map="auto"))
    alone = load_model(loading(tiny_model, load_in="8bit"))
    assert fingerprint_model(model) == fingerprint_model(alone)


def rows_by_token(cache: Cache, name: str) -> dict[tuple[int, int], np.ndarray]:
    """Return the rows of a cache by (sequence of the harvest, position)."""
    found = {}
    for shard in cache.shards:
        words, rows = cache.tokens(shard), cache.row_dtype.to_torch(cache.read(name, shard)).numpy()
        first = cache.receipts[shard].first_sequence
        positions = zip(words.row_sequence, words.row_position, strict=True)
        for position, row in zip(positions, rows, strict=True):
            found[first + int(position[0]), int(position[1])] = row
    return found


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_harvest_with_quantised_weights_has_another_cache_id(
    load_in: str, options: Callable[..., Any], wide_model: Path, tree: Callable[..., Any]
) -> None:
    given = {"model": str(wide_model), "max_tokens": 16 * 8, "load_in": load_in}
    cache = Cache.open(harvest(options(**given)).cache)
    before = tree(cache.root)
    identity = cache.manifest.identity
    assert (identity.model_dtype, identity.dtype) == ("float32", "float32")
    model = load_model(options(**given))
    tokens = torch.from_numpy(cache.tokens(0).tokens).long()
    states = captured(model, tokens)["layers.0"].numpy()
    for (sequence, position), row in rows_by_token(cache, "layers.0").items():
        if sequence < len(tokens):
            assert np.array_equal(row, states[sequence, position])
    with pytest.raises(CacheMismatchError, match=r"holds another cache[^$]*model: "):
        harvest(options(**(given | {"load_in": "none"})))
    assert harvest(options(**given)).new_shards == 0
    assert tree(cache.root) == before


def test_with_8_bits_rows_depend_on_the_batch_and_every_shard_size_gives_the_same_batches(
    options: Callable[..., Any], wild_model: Path, tmp_path: Path
) -> None:
    model = load_model(loading(wild_model, load_in="8bit"))
    one, other = IDS[:, :16], IDS.roll(1, 1)[:, :16].clone()
    other[0] = one[0]
    first = [captured(model, ids)["layers.1"][0] for ids in (one, other)]
    assert not torch.equal(*first)  # the same sequence in another batch
    found = []
    for shard_size, sequences in ((4, 16), (8, 16), (8, 15)):  # the last is rounded down to 12
        given = {"shard_size": shard_size, "max_tokens": 16 * sequences, "load_in": "8bit"}
        out = str(tmp_path / f"{shard_size}-{sequences}")
        cache = Cache.open(harvest(options(model=str(wild_model), out=out, **given)).cache)
        assert cache.complete
        found.append((cache.manifest, rows_by_token(cache, "layers.0"), cache.end.reason))
    assert len({manifest.cache_id for manifest, *_ in found}) == 1
    assert [manifest.planned_sequences for manifest, *_ in found] == [16, 16, 12]
    assert {reason for *_, reason in found} == {"goal"}
    whole = found[0][1]
    for _, rows, _ in found:
        assert all(np.array_equal(row, whole[address]) for address, row in rows.items())


def test_a_harvest_with_an_offloaded_model_writes_the_same_bytes(
    options: Callable[..., Any], tree: Callable[..., Any], tmp_path: Path
) -> None:
    harvest(options())
    spread = {"device_map": "auto", "max_memory": (PART,)}
    harvest(options(out=str(tmp_path / "spread"), **spread))
    assert tree(tmp_path / "spread") == tree(options().out)
    assert harvest(options(**spread)).new_shards == 0  # either may resume the other


def test_a_model_that_was_probed_with_its_weights_is_not_loaded_again(
    options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from actcache.harvester import job, resolve

    def refuse(*_: Any) -> None:
        raise NotImplementedError("no meta")

    def again(*_: Any) -> None:
        raise AssertionError("the weights were loaded twice")

    monkeypatch.setattr(resolve, "load_meta_model", refuse)
    monkeypatch.setattr(job, "load_model", again)
    assert harvest(options(device_map="auto", max_memory=("cpu=1KB",))).complete


def test_quantised_weights_are_fingerprinted_before_they_are_used(
    options: Callable[..., Any],
    wide_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tree: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """The first forward pass makes bitsandbytes repack 4-bit weights for the CPU."""
    from actcache.harvester import resolve

    given = {"model": str(wide_model), "load_in": "4bit", "max_tokens": 64}
    harvest(options(**given))

    def refuse(*_: Any) -> None:
        raise NotImplementedError("no meta")

    monkeypatch.setattr(resolve, "load_meta_model", refuse)
    harvest(options(out=str(tmp_path / "other"), **given))
    assert tree(tmp_path / "other") == tree(options().out)


def test_device_map_auto_is_refused_with_several_processes_per_machine(
    options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"(?s)--device-map auto uses every GPU.*nproc_per_node"):
        harvest(options(device_map="auto"))
    assert not Path(options().out).exists()
