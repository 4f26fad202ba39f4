"""`saetrain.formats.sparsify` against the sparsify package. D d_in, M num_latents."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import saetrain.formats.sparsify
from actcache.errors import ConfigError, FormatError, RunError
from actcache.filesystem.atomic import digest_file
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeConfig
from saetrain.evaluation import evaluate
from saetrain.formats.sparsify import (
    CONFIG,
    WEIGHTS,
    load_sae,
    read_config,
    read_sae,
    read_sae_config,
    save_sae,
)
from saetrain.launch.run import fit
from saetrain.model.sae import Sae, build_sae

D, M, K = 8, 20, 3


def randomised(sae: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


def batch(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(50, D, generator=torch.Generator().manual_seed(4)).to(dtype)


def saved(folder: Path) -> Sae:
    """Return an SAE and save it in `folder`."""
    sae: Sae = randomised(Sae(D, M, K))
    save_sae(folder, SaeConfig(D, M, K), dict(sae.named_parameters()))
    return sae


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = load_file(folder / WEIGHTS) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS)


def test_sparsify_loads_our_saes_and_reconstructs_the_same(
    sparsify: ModuleType, tmp_path: Path
) -> None:
    sae = saved(tmp_path / "layers.9.mlp")
    peer = sparsify.SparseCoder.load_from_disk(tmp_path / "layers.9.mlp")
    assert (peer.d_in, peer.num_latents, peer.cfg.k) == (D, M, K)
    torch.testing.assert_close(
        sae(batch()).reconstruction, peer(batch()).sae_out, rtol=1e-5, atol=1e-5
    )
    many = sparsify.SparseCoder.load_many(str(tmp_path), local=True)
    assert list(many) == ["layers.9.mlp"]


@pytest.mark.parametrize("num_latents", [0, M])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saes_of_sparsify_load_and_reconstruct_the_same(
    sparsify: ModuleType, tmp_path: Path, num_latents: int, dtype: torch.dtype
) -> None:
    config = sparsify.SparseCoderConfig(num_latents=num_latents, expansion_factor=4, k=K)
    peer = randomised(sparsify.SparseCoder(D, config, dtype=dtype))
    peer.save_to_disk(tmp_path)
    sae = load_sae(tmp_path)
    assert (sae.d_in, sae.num_latents, sae.k) == (D, num_latents or 4 * D, K)
    assert sae.W_enc.dtype == dtype
    for ours, theirs in (
        (sae.W_enc, peer.encoder.weight),
        (sae.b_enc, peer.encoder.bias),
        (sae.W_dec, peer.W_dec),
        (sae.b_dec, peer.b_dec),
    ):
        assert torch.equal(ours, theirs)
    if dtype != torch.bfloat16:  # ties make the choice of latents ambiguous
        torch.testing.assert_close(
            sae(batch(dtype)).reconstruction, peer(batch(dtype)).sae_out, rtol=1e-5, atol=1e-5
        )


def test_our_config_has_exactly_the_keys_of_sparsify(sparsify: ModuleType, tmp_path: Path) -> None:
    saved(tmp_path / "ours")
    config = sparsify.SparseCoderConfig(num_latents=M, expansion_factor=2, k=K)
    sparsify.SparseCoder(D, config).save_to_disk(tmp_path / "theirs")
    ours, theirs = (
        json.loads((tmp_path / side / CONFIG).read_text()) for side in ("ours", "theirs")
    )
    assert ours == theirs
    ours_file, theirs_file = (load_file(tmp_path / side / WEIGHTS) for side in ("ours", "theirs"))
    assert {n: (t.shape, t.dtype) for n, t in ours_file.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs_file.items()
    }


def test_a_saved_sae_replaces_an_older_one_and_loads_bit_for_bit(tmp_path: Path) -> None:
    save_sae(str(tmp_path), SaeConfig(D, M, 1), dict(Sae(D, M, 1).named_parameters()))
    sae, loaded = saved(tmp_path), load_sae(str(tmp_path))
    assert loaded.k == K
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_keys_of_other_versions_are_ignored_and_missing_ones_have_defaults(
    tmp_path: Path,
) -> None:
    (tmp_path / CONFIG).write_text('{"d_in": 4, "signed": false, "jumprelu": null}')
    config = read_config(tmp_path)
    assert (config.d_in, config.k, config.expansion_factor, config.num_latents) == (4, 32, 32, 0)


def test_a_folder_without_an_sae_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds no SAE(.|\n)*cfg\.json"):
        load_sae(tmp_path)
    saved(tmp_path / "half")
    (tmp_path / "half" / WEIGHTS).unlink()
    with pytest.raises(FormatError, match=WEIGHTS):
        load_sae(tmp_path / "half")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"d_in": "8"}', '{"d_in": 8, "k": 2.5}', "NaN"]
)
def test_a_damaged_config_raises_an_error(tmp_path: Path, text: str) -> None:
    saved(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(FormatError, match=r"cfg\.json"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "groupmax"},
        {"activation": "relu6"},
        {"matryoshka": [8, 4]},
        {"widths": [4, 5]},
        {"d_out": 9},
        {"bandwidth": 0.0},
        {"k": M + 1},
        {"k": 0},
        {"d_in": 0},
        {"d_in": -8},
        {"num_latents": -20},
    ],
    ids=str,
)
def test_an_unknown_kind_or_impossible_sizes_raise_an_error(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    saved(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(FormatError, match=r"cfg\.json"):
        load_sae(tmp_path)


SHARED_KINDS = [
    {"transcode": True},
    {"transcode": True, "skip_connection": True},
    {"activation": "groupmax", "k": 4},
    {"multi_topk": True},
]


@pytest.mark.parametrize("kind", SHARED_KINDS, ids=str)
def test_every_kind_of_sparsify_loads_and_saves_with_the_same_reconstruction(
    sparsify: ModuleType, tmp_path: Path, kind: dict[str, Any]
) -> None:
    config = sparsify.SparseCoderConfig(num_latents=M, **{"k": K} | kind)
    peer = randomised(sparsify.SparseCoder(D, config))
    peer.save_to_disk(tmp_path / "theirs")
    sae = load_sae(tmp_path / "theirs")
    expected = {"rtol": 1e-5, "atol": 1e-5}
    peer.cfg.multi_topk = False  # with it, sparsify returns the reconstruction of 4k latents
    torch.testing.assert_close(sae(batch()).reconstruction, peer(batch()).sae_out, **expected)
    ours = SaeConfig(D, M, **{"k": K} | kind)
    save_sae(tmp_path / "ours", ours, dict(sae.named_parameters()))
    again = sparsify.SparseCoder.load_from_disk(tmp_path / "ours")
    torch.testing.assert_close(again(batch()).sae_out, peer(batch()).sae_out, **expected)
    assert read_sae_config(tmp_path / "ours") == read_sae_config(tmp_path / "theirs") == ours
    cfgs = [json.loads((tmp_path / side / CONFIG).read_text()) for side in ("ours", "theirs")]
    trained = {"multi_topk": False, "trained_multi_topk": True} if ours.multi_topk else {}
    assert cfgs[0] == cfgs[1] | {"expansion_factor": 2} | trained


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_saves_multi_topk_by_its_defaults_and_sparsify_reconstructs_from_k_by_the_newest(
    sparsify: ModuleType, options: Callable[..., FitConfig], version: int
) -> None:
    config = options(multi_topk=True, hookpoint="layers.0", defaults=version)
    fit(config)
    folder = Path(config.out) / "layers.0"
    sae, peer = load_sae(folder), sparsify.SparseCoder.load_from_disk(folder)
    assert read_sae_config(folder).multi_topk
    assert peer.cfg.multi_topk == (version == 1)
    x = torch.randn(32, 16)
    theirs, found = peer(x).sae_out, sae(x)
    k_latents = torch.allclose(theirs, found.reconstruction, rtol=1e-5, atol=1e-5)
    assert k_latents == (version == 2)
    evaluate(config.out)  # compares cfg.json with the run


def test_groupmax_with_multi_topk_loads_without_it(sparsify: ModuleType, tmp_path: Path) -> None:
    config = sparsify.SparseCoderConfig(num_latents=M, k=4, activation="groupmax", multi_topk=True)
    sparsify.SparseCoder(D, config).save_to_disk(tmp_path)
    assert read_sae_config(tmp_path) == SaeConfig(D, M, 4, activation="groupmax")


OUR_KINDS = [
    SaeConfig(D, M, K, activation="batchtopk", matryoshka=(5, 9)),
    SaeConfig(D, M, K, activation="jumprelu", sparsity=0.25, threshold=0.5, bandwidth=0.125),
    SaeConfig(D, M, K, activation="relu", sparsity=0.5),
    SaeConfig(D, M, K, activation="gated", sparsity=0.5),
    SaeConfig(D, M, K, transcode=True, skip_connection=True, d_out=5),
    SaeConfig(D, M, K, activation="gated", transcode=True, d_out=3),
]


@pytest.mark.parametrize("config", OUR_KINDS, ids=lambda c: f"{c.activation} {c.width_out}")
def test_kinds_that_sparsify_lacks_load_here_and_raise_an_error_there(
    sparsify: ModuleType, tmp_path: Path, config: SaeConfig
) -> None:
    sae = randomised(build_sae(config))
    if config.activation == "batchtopk":
        sae.activation.threshold.fill_(0.75)
    save_sae(tmp_path, config, sae.state_dict(), ("a", "b"))
    loaded = load_sae(tmp_path)
    assert read_sae_config(tmp_path) == config
    assert read_config(tmp_path).hookpoints == ("a", "b")
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert torch.equal(loaded(batch()).reconstruction, sae.eval()(batch()).reconstruction)
    with pytest.raises((TypeError, RuntimeError)):
        sparsify.SparseCoder.load_from_disk(tmp_path)


def test_matryoshka_and_topk_crosscoders_load_in_sparsify_as_autoencoders(
    sparsify: ModuleType, tmp_path: Path
) -> None:
    config = SaeConfig(D, M, K, matryoshka=(4,), widths=(3, 5))
    sae = randomised(build_sae(config))
    save_sae(tmp_path, config, sae.state_dict(), ("a", "b"))
    peer = sparsify.SparseCoder.load_from_disk(tmp_path)
    torch.testing.assert_close(
        peer(batch()).sae_out, sae(batch()).reconstruction, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ({"activation": "batchtopk"}, "threshold"),
        ({"activation": "jumprelu"}, "threshold"),
        ({"activation": "gated"}, "b_mag"),
        ({"activation": "gated"}, "r_mag"),
        ({"transcode": True, "skip_connection": True}, "W_skip"),
    ],
    ids=str,
)
def test_a_missing_tensor_of_a_kind_raises_an_error_that_names_it(
    tmp_path: Path, kind: dict[str, Any], name: str
) -> None:
    config = SaeConfig(D, M, K, **kind)
    save_sae(tmp_path, config, build_sae(config).state_dict())
    edit_tensors(tmp_path, **{name: torch.zeros(2, 2)})
    with pytest.raises(FormatError, match=rf"tensor {name}"):
        load_sae(tmp_path)
    edit_tensors(tmp_path, **{name: None})
    with pytest.raises(FormatError, match=rf"tensor {name}(.|\n)*nothing"):
        load_sae(tmp_path)


@pytest.mark.parametrize("name", ["encoder.weight", "encoder.bias", "W_dec", "b_dec"])
def test_a_missing_tensor_or_another_shape_raises_an_error_that_names_it(
    tmp_path: Path, name: str
) -> None:
    saved(tmp_path)
    shape = load_file(tmp_path / WEIGHTS)[name].shape
    edit_tensors(tmp_path, **{name: torch.zeros(*shape, 1)})
    with pytest.raises(FormatError, match=rf"tensor {name}"):
        load_sae(tmp_path)
    edit_tensors(tmp_path, **{name: None})
    with pytest.raises(FormatError, match=rf"tensor {name}(.|\n)*nothing"):
        load_sae(tmp_path)


def test_a_config_of_other_sizes_than_its_tensors_raises_before_allocating(
    tmp_path: Path,
) -> None:
    saved(tmp_path)
    edit_config(tmp_path, num_latents=2**30)
    with pytest.raises(FormatError, match=r"encoder\.weight"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"sparsity": 1e300},
        {"threshold": 1e31},
        {"bandwidth": 0},
        {"num_latents": 10**11},
        {"num_latents": -1},
        {"d_in": 2**40},
        {"d_out": -16},
        {"k": 0},
        {"expansion_factor": 10**9, "num_latents": 0},
        {"widths": [2**40, 1]},
    ],
    ids=str,
)
def test_a_config_out_of_range_raises_an_error(tmp_path: Path, change: dict[str, Any]) -> None:
    saved(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(FormatError, match=r"cfg\.json"):
        load_sae(tmp_path)


def test_integer_weights_raise_an_error(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: t.to(torch.int32) for name, t in tensors.items()}, tmp_path / WEIGHTS)
    with pytest.raises(FormatError, match="I32"):
        load_sae(tmp_path)


def test_weights_of_8_bits_raise_an_error(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    eight = {name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}
    for names in (tensors, ["encoder.weight"], ["encoder.bias"]):
        save_file(tensors | {name: eight[name] for name in names}, tmp_path / WEIGHTS)
        with pytest.raises(FormatError, match="F8_E4M3"):
            load_sae(tmp_path)


def test_the_bytes_that_are_compared_are_those_that_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program replaces the file just after it was read."""
    sae, real = saved(tmp_path), saetrain.formats.sparsify.read_tensors_file
    expected = digest_file(tmp_path / WEIGHTS)

    def read(path: Path) -> bytes:
        data = real(path)
        edit_tensors(tmp_path, W_dec=torch.zeros(M, D))
        return data

    monkeypatch.setattr(saetrain.formats.sparsify, "read_tensors_file", read)
    loaded, _ = read_sae(tmp_path, expected=expected)
    assert torch.equal(loaded.W_dec, sae.W_dec)
    with pytest.raises(RunError, match="differs from the file that its run names"):
        read_sae(tmp_path, expected=expected)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_pipe_in_place_of_a_file_raises_an_error(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(FormatError, match=name):
        load_sae(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 300])
def test_a_truncated_weights_file_raises_an_error(tmp_path: Path, keep: int) -> None:
    saved(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(FormatError, match=WEIGHTS):
        load_sae(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["encoder.weight", "b_dec"])
def test_weights_that_are_not_finite_raise_an_error_that_names_the_tensor(
    tmp_path: Path, name: str, value: float
) -> None:
    saved(tmp_path)
    tensor = load_file(tmp_path / WEIGHTS)[name]
    tensor.view(-1)[-1] = value
    edit_tensors(tmp_path, **{name: tensor})
    with pytest.raises(FormatError, match=rf"{WEIGHTS}: tensor {name} is not finite"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"b_dec": None},
        {"W_dec": torch.zeros(M - 1, D)},
        {"W_dec": torch.zeros(M, D, dtype=torch.int32)},
        {"W_dec": torch.zeros(M, D).to(torch.float8_e4m3fn)},
        {"W_enc": torch.full((M, D), torch.nan)},
        {"b_enc": torch.full((M,), torch.inf)},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_what_would_not_load_is_not_saved(
    tmp_path: Path, change: dict[str, torch.Tensor | None]
) -> None:
    weights = dict(Sae(D, M, K).named_parameters()) | change
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(ConfigError, match=next(iter(change))):
        save_sae(tmp_path / "new", SaeConfig(D, M, K), kept)
    assert not (tmp_path / "new").exists()


def test_weights_that_share_memory_are_saved_and_loaded(tmp_path: Path) -> None:
    sae = Sae(D, M, K)
    weights = dict(sae.named_parameters()) | {"W_dec": sae.W_enc}
    save_sae(tmp_path, SaeConfig(D, M, K), weights)
    assert torch.equal(load_sae(tmp_path).W_dec, sae.W_enc)
