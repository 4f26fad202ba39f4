"""sparsify's checkpoints, our native ones: `cfg.json` beside `sae.safetensors`.

Tensors `encoder.weight` [M, D], `encoder.bias` [M], `W_dec` [M, E], `b_dec` [E], of a skip
transcoder `W_skip` [E, D]; E is D but for transcoders. The keys of cfg.json are those of sparsify
1.3.3, whose loader drops others.

What sparsify cannot express has further keys and tensors: `threshold` [M] (jumprelu) or [] float64
(batchtopk), `r_mag` and `b_mag` [M] (gated). It knows no such `activation`, and refuses the file;
so it does where an output is not as wide as its input, by the shapes. A crosscoder with TopK loads
there as an autoencoder of its hookpoints' rows side by side, which is what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from actcache.core.json_codec import parse_dataclass, read_json, to_json
from actcache.errors import ConfigError, FormatError
from actcache.filesystem.atomic import FileDigest, write_atomic
from saetrain.config.sae import ActivationName, SaeConfig
from saetrain.model.factory import build_sae
from saetrain.model.sae import Sae

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
"""Our parameter to its name in the file."""


@dataclass(frozen=True)
class SparsifyConfig:
    """Contents of cfg.json, sparsify's defaults where a key is missing."""

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

    # Ours, written where they say something.
    d_out: int | None = None
    matryoshka: tuple[int, ...] = ()
    sparsity: float = 0.0
    threshold: float = SaeConfig.threshold
    bandwidth: float = SaeConfig.bandwidth
    widths: tuple[int, ...] = ()
    hookpoints: tuple[str, ...] = ()
    """Of a transcoder or crosscoder: what it reads, side by side."""


_OURS = ("d_out", "matryoshka", "sparsity", "threshold", "bandwidth", "widths", "hookpoints")


def save_sae(
    folder: Path,
    config: SaeConfig,
    weights: Mapping[str, Tensor],
    reads: tuple[str, ...] = (),
    unit_rows: bool = True,
) -> FileDigest:
    """Write a checkpoint, which sparsify loads if it knows the kind.

    Args:
        folder: made when missing.
        config: sizes and kind.
        weights: W_enc [M, D], b_enc [M], W_dec [M, E], b_dec [E], and what else the kind has.
        reads: hookpoints that it reads, if the folder's name does not say it.
        unit_rows: whether whoever trains them on is to keep decoder rows at norm 1; of a
            transcoder's, nobody does.

    Returns:
        What its weights' file must be.
    """
    tensors = {
        theirs: weights[ours].detach().cpu().contiguous()
        for ours, theirs in _TENSORS.items()
        if ours in weights
    }
    said = asdict(config) | {"hookpoints": reads, "normalize_decoder": unit_rows}
    said["expansion_factor"] = max(1, config.num_latents // config.d_in)
    cfg = SparsifyConfig(**said)
    default = SparsifyConfig(config.d_in)
    keys = {
        key: value
        for key, value in asdict(cfg).items()
        if key not in _OURS or value != getattr(default, key)
    }
    receipt = write_atomic(folder / WEIGHTS, [save(tensors)])
    write_atomic(folder / CONFIG, [to_json(keys)])
    return receipt


def load_sae(folder: Path, device: torch.device | str = "cpu") -> Sae:
    """Read a checkpoint of ours or of sparsify's, to be used (`Sae.eval`).

    Raises:
        FormatError: a file is missing, damaged, or of a kind of SAE that is not read here.
    """
    config = read_sae_config(folder)
    path = folder / WEIGHTS
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise FormatError(f"cannot read {path}", got=str(error)) from error
    shapes = _shapes(config)
    for ours, shape in shapes.items():
        theirs = _TENSORS[ours]
        got = tuple(tensors[theirs].shape) if theirs in tensors else "nothing"
        if got != shape:
            raise FormatError(f"{path}: tensor {theirs}", expected=shape, got=got)
    for theirs in map(_TENSORS.__getitem__, shapes):
        if not (dtype := tensors[theirs].dtype).is_floating_point:
            raise FormatError(f"{path}: type of {theirs}", expected="floats", got=dtype)
    sae = build_sae(config, device=device, dtype=tensors["encoder.weight"].dtype)
    sae.load_state_dict({ours: tensors[_TENSORS[ours]] for ours in shapes})
    return sae.eval()


def _shapes(config: SaeConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an SAE, by our names. Known without making one."""
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
    """The cfg.json of a checkpoint, key by key; raises `FormatError`."""
    path = folder / CONFIG
    try:
        obj = read_json(path)
    except OSError as error:
        raise FormatError(f"{folder} holds no SAE", expected=f"{CONFIG} and {WEIGHTS}") from error
    if isinstance(obj, dict):  # other versions of sparsify write keys that mean nothing here
        obj = {key: obj[key] for key in obj if key in SparsifyConfig.__dataclass_fields__}
    return parse_dataclass(SparsifyConfig, obj, str(path))


def read_sae_config(folder: Path) -> SaeConfig:
    """The kind and sizes of the SAE in a folder; raises `FormatError`."""
    cfg = read_config(folder)
    try:
        return SaeConfig(
            cfg.d_in,
            cfg.num_latents or cfg.d_in * cfg.expansion_factor,
            cfg.k,
            activation=cfg.activation,
            # sparsify has it with groupmax too; it was for training only
            multi_topk=cfg.multi_topk and cfg.activation == "topk" and not cfg.matryoshka,
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
            f"{folder / CONFIG} holds an SAE that cannot be: {error.what}",
            expected=error.expected,
            got=error.got,
        ) from error
