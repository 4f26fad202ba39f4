"""The export format: sparsify's checkpoints, `cfg.json` and `sae.safetensors`.

Tensors: `encoder.weight` [M, D], `encoder.bias` [M], `W_dec` [M, E], `b_dec` [E], and `W_skip`
[E, D] of a skip transcoder. E equals D except in transcoders. The keys of cfg.json are those of
sparsify 1.3.3, whose loader ignores others.

Features that sparsify lacks have additional keys and tensors: `threshold` [M] (jumprelu) or []
float64 (batchtopk), `r_mag` and `b_mag` [M] (gated). sparsify rejects such a file by its
`activation`, and by the shapes if E differs from D. A crosscoder with TopK loads in sparsify as an
autoencoder of its hookpoints' rows side by side. With `multi_topk`, sparsify reconstructs from 4k
latents. So a Multi-TopK SAE has `trained_multi_topk` instead, and reconstructs from k there, too.
Files of sparsify, and of runs with the defaults of version 1, have `multi_topk`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from actcache.core.arguments import checked
from actcache.core.json_codec import parse_dataclass, read_json, to_json
from actcache.core.process import choose_device
from actcache.errors import ConfigError, FormatError, RunError
from actcache.filesystem.atomic import FileDigest, write_atomic
from saetrain.config.sae import ActivationName, SaeConfig
from saetrain.model.sae import Sae, build_sae
from saetrain.runs.own_files import digest_bytes
from saetrain.runs.tensors import Header, load_tensors, read_header, read_tensors_file

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"

_TENSORS = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
    "W_skip": "W_skip",
    "activation.threshold": "threshold",
    "activation.r_mag": "r_mag",
    "activation.b_mag": "b_mag",
}
"""Maps names in `Sae.state_dict()` to names in the file."""


@dataclass(frozen=True)
class SparsifyConfig:
    """Contents of cfg.json; a missing key has sparsify's default."""

    d_in: int
    activation: ActivationName = "topk"
    expansion_factor: int = 32
    normalize_decoder: bool = True
    num_latents: int = 0
    """0: d_in * expansion_factor."""
    k: int = 32
    multi_topk: bool = False
    skip_connection: bool = False
    transcode: bool = False

    # Additional keys, written only if they differ from the default.
    d_out: int | None = None
    matryoshka: tuple[int, ...] = ()
    sparsity: float = 0.0
    threshold: float = SaeConfig.threshold
    bandwidth: float = SaeConfig.bandwidth
    widths: tuple[int, ...] = ()
    hookpoints: tuple[str, ...] = ()
    """Hookpoints that a transcoder or crosscoder reads, side by side."""
    trained_multi_topk: bool = False
    """Trained with Multi-TopK, as `multi_topk` says in other files; reconstructs from k latents."""


_ADDITIONAL = (
    "d_out", "matryoshka", "sparsity", "threshold", "bandwidth", "widths", "hookpoints",
    "trained_multi_topk",
)  # fmt: skip


@checked()
def save_sae(
    folder: str | os.PathLike[str],
    config: SaeConfig,
    weights: Mapping[str, Tensor],
    reads: tuple[str, ...] = (),
    unit_rows: bool = True,
) -> FileDigest:
    """Write an SAE in the export format.

    Args:
        folder: created if missing.
        config: kind and sizes.
        weights: W_enc [M, D], b_enc [M], W_dec [M, E], b_dec [E], and further tensors of the kind.
        reads: hookpoints that it reads, unless the folder is named after the only one.
        unit_rows: `normalize_decoder` of cfg.json: keep decoder rows at norm 1 in further training
            (ignored for transcoders).

    Returns:
        Digest of the weights file.

    Raises:
        ConfigError: a tensor is missing, of another shape, not of floats, or not finite. Nothing is
            written then.
    """
    _require_loadable(config, weights)
    weights = {name: tensor.clone() for name, tensor in weights.items()}  # some may share memory
    return export_sae(folder, config, weights, reads, unit_rows).weights


def _require_loadable(config: SaeConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise `ConfigError` for weights that `load_sae` would refuse."""
    for name, shape in _shapes(config).items():
        tensor = weights.get(name)
        got: object = "nothing" if tensor is None else tuple(tensor.shape)
        if tensor is None or got != shape:
            raise ConfigError(f"weights of another SAE: {name}", expected=shape, got=got)
        if tensor.dtype not in _SAVED:
            raise ConfigError(f"dtype of {name}", expected=_SAVED, got=tensor.dtype)
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"weights that are not finite: {name}")


_SAVED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class SaeDigests(NamedTuple):
    """Digests of the two files of an SAE."""

    weights: FileDigest
    config: FileDigest


def export_sae(
    folder: str | os.PathLike[str],
    config: SaeConfig,
    weights: Mapping[str, Tensor],
    reads: tuple[str, ...] = (),
    unit_rows: bool = True,
    multi_topk: bool = False,
) -> SaeDigests:
    """Write an SAE as `save_sae` does; return the digests of both files.

    With `multi_topk`, cfg.json of a Multi-TopK SAE has that key, not `trained_multi_topk`.
    """
    folder = folder if isinstance(folder, Path) else Path(folder)  # keeps a root
    tensors = {
        stored: weights[name].detach().cpu().contiguous()
        for name, stored in _TENSORS.items()
        if name in weights
    }
    values = asdict(config) | {"hookpoints": reads, "normalize_decoder": unit_rows}
    values["expansion_factor"] = max(1, config.num_latents // config.d_in)
    values["multi_topk"] = config.multi_topk and multi_topk
    values["trained_multi_topk"] = config.multi_topk and not multi_topk
    cfg = SparsifyConfig(**values)
    default = SparsifyConfig(config.d_in)
    keys = {
        key: value
        for key, value in asdict(cfg).items()
        if key not in _ADDITIONAL or value != getattr(default, key)
    }
    digest = write_atomic(folder / WEIGHTS, [save(tensors)])
    return SaeDigests(digest, write_atomic(folder / CONFIG, [to_json(keys)]))


@checked()
def load_sae(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Sae:
    """Load an SAE saved by `save_sae` or sparsify, in evaluation mode.

    Args:
        folder: folder of cfg.json and sae.safetensors.
        device: device of its weights.

    Raises:
        FormatError: a file is missing or damaged, a weight is not finite, or the kind of SAE is
            unknown.
        ConfigError: the device cannot be used, or an argument has another type.
    """
    folder = folder if isinstance(folder, Path) else Path(folder)  # keeps a root
    return read_sae(folder, choose_device(str(device)))[0]


def read_sae(
    folder: Path, device: torch.device | str = "cpu", expected: FileDigest | None = None
) -> tuple[Sae, SaeConfig]:
    """Load an SAE and its configuration, as `load_sae` does.

    Args:
        folder: folder of cfg.json and sae.safetensors.
        device: device of its weights.
        expected: digest of the weights' file, which is read once; None: any.

    Raises:
        RunError: the weights' file has another digest.
        FormatError: see `load_sae`.
    """
    config, path = read_sae_config(folder), folder / WEIGHTS
    data = read_tensors_file(path)
    if expected is not None and (got := digest_bytes(data)) != expected:
        raise RunError(
            f"{path} differs from the file that its run names",
            expected=expected,
            got=got,
            remedy="restore it from a copy",
        )
    tensors = load_tensors(path, data, lambda header: _require_shapes(path, header, config))
    del data
    sae = build_sae(config, device=device, dtype=tensors["encoder.weight"].dtype)
    sae.load_state_dict({name: tensors[_TENSORS[name]] for name in _shapes(config)})
    for name, tensor in sae.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise FormatError(f"{path}: tensor {_TENSORS[name]} is not finite")
    return sae.eval(), config


def digest_weights(folder: Path, config: SaeConfig) -> FileDigest:
    """Compare the header of sae.safetensors with a configuration; return the file's digest.

    Nothing is allocated for the tensors.

    Args:
        folder: folder of the SAE.
        config: its kind and sizes.

    Raises:
        FormatError: the file is missing or damaged, or a tensor has another shape or dtype.
    """
    path = folder / WEIGHTS
    data = read_tensors_file(path)
    _require_shapes(path, read_header(path, data), config)
    return digest_bytes(data)


def _require_shapes(path: Path, header: Header, config: SaeConfig) -> None:
    for name, shape in _shapes(config).items():
        stored = _TENSORS[name]
        got, dtype = header.get(stored, ("nothing", "F32"))
        if got != shape:
            raise FormatError(f"{path}: tensor {stored}", expected=shape, got=got)
        if dtype not in _FLOATS:
            raise FormatError(f"{path}: dtype of {stored}", expected="floats", got=dtype)


_FLOATS = ("F64", "F32", "F16", "BF16")


def _shapes(config: SaeConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of an SAE, by its name in `Sae.state_dict()`."""
    D, E, M = config.d_in, config.width_out, config.num_latents
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (M, D),
        "b_enc": (M,),
        "W_dec": (M, E),
        "b_dec": (E,),
    }
    if config.skip_connection:
        shapes["W_skip"] = (E, D)
    if config.activation in ("batchtopk", "jumprelu"):
        shapes["activation.threshold"] = (M,) if config.activation == "jumprelu" else ()
    if config.activation == "gated":
        shapes |= {"activation.r_mag": (M,), "activation.b_mag": (M,)}
    return shapes


def read_config(folder: Path) -> SparsifyConfig:
    """Read cfg.json as it is; raises `FormatError`."""
    path = folder / CONFIG
    try:
        obj = read_json(path)
    except OSError as error:
        raise FormatError(f"{folder} holds no SAE", expected=f"{CONFIG} and {WEIGHTS}") from error
    if isinstance(obj, dict):  # ignore keys of other versions of sparsify
        obj = {key: obj[key] for key in obj if key in SparsifyConfig.__dataclass_fields__}
    return parse_dataclass(SparsifyConfig, obj, str(path))


def read_sae_config(folder: Path) -> SaeConfig:
    """Read the kind and sizes of the SAE in a folder; raises `FormatError`."""
    cfg = read_config(folder)
    multi_topk = cfg.multi_topk or cfg.trained_multi_topk
    try:
        return SaeConfig(
            cfg.d_in,
            cfg.num_latents or cfg.d_in * cfg.expansion_factor,
            cfg.k,
            activation=cfg.activation,
            # In sparsify, groupmax may have it too; it affects only training.
            multi_topk=multi_topk and cfg.activation == "topk" and not cfg.matryoshka,
            matryoshka=cfg.matryoshka,
            transcode=cfg.transcode,
            skip_connection=cfg.skip_connection,
            d_out=cfg.d_out,
            widths=cfg.widths,
            sparsity=cfg.sparsity,
            threshold=cfg.threshold,
            bandwidth=cfg.bandwidth,
        )
    except ConfigError as error:
        raise FormatError(
            f"{folder / CONFIG} holds an impossible SAE: {error.what}",
            expected=error.expected,
            got=error.got,
        ) from error
