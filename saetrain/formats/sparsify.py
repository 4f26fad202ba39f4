"""sparsify's checkpoints, our native ones: `cfg.json` beside `sae.safetensors`.

Tensors `encoder.weight` [M, D], `encoder.bias` [M], `W_dec` [M, D], `b_dec` [D]. The keys of
cfg.json are those of sparsify 1.3.3; its loader drops unknown keys, so we write none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from actcache.atomic import FileReceipt, publish
from actcache.errors import FormatError
from actcache.parse import parse_dataclass, read_json, to_json
from saetrain.config import SaeConfig
from saetrain.sae import Sae

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"

_TENSORS = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
}
"""Our parameter to its name in the file."""


@dataclass(frozen=True)
class SparsifyConfig:
    """Contents of cfg.json, sparsify's defaults where a key is missing."""

    d_in: int
    activation: Literal["topk", "groupmax"] = "topk"
    expansion_factor: int = 32
    normalize_decoder: bool = True
    num_latents: int = 0
    """0: d_in * expansion_factor."""
    k: int = 32
    multi_topk: bool = False
    skip_connection: bool = False
    transcode: bool = False


def save_sae(
    folder: Path, config: SaeConfig, weights: Mapping[str, Tensor], unit_rows: bool = True
) -> FileReceipt:
    """Write a checkpoint that sparsify loads; returns what its weights' file must be.

    Args:
        folder: made when missing.
        config: sizes.
        weights: W_enc [M, D], b_enc [M], W_dec [M, D], b_dec [D].
        unit_rows: whether whoever trains them on is to keep decoder rows at norm 1.
    """
    tensors = {
        theirs: weights[ours].detach().cpu().contiguous() for ours, theirs in _TENSORS.items()
    }
    factor = max(1, config.num_latents // config.d_in)
    cfg = SparsifyConfig(
        d_in=config.d_in,
        expansion_factor=factor,
        normalize_decoder=unit_rows,
        num_latents=config.num_latents,
        k=config.k,
    )
    receipt = publish(folder / WEIGHTS, [save(tensors)])
    publish(folder / CONFIG, [to_json(asdict(cfg))])
    return receipt


def load_sae(folder: Path, device: torch.device | str = "cpu") -> Sae:
    """Read a checkpoint of ours or of sparsify's.

    Raises:
        FormatError: a file is missing, damaged, or of a kind of SAE that is not read here.
    """
    cfg = read_config(folder)
    path = folder / WEIGHTS
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise FormatError(f"cannot read {path}", got=str(error)) from error
    num_latents = cfg.num_latents or cfg.d_in * cfg.expansion_factor
    shapes = {
        "W_enc": (num_latents, cfg.d_in),
        "b_enc": (num_latents,),
        "W_dec": (num_latents, cfg.d_in),
        "b_dec": (cfg.d_in,),
    }
    for ours, theirs in _TENSORS.items():
        got = tuple(tensors[theirs].shape) if theirs in tensors else "nothing"
        if got != shapes[ours]:
            raise FormatError(f"{path}: tensor {theirs}", expected=shapes[ours], got=got)
    sizes = SaeConfig(cfg.d_in, num_latents, cfg.k)
    dtype = tensors["encoder.weight"].dtype
    if not dtype.is_floating_point:
        raise FormatError(f"{path} holds weights of another type", expected="floats", got=dtype)
    sae = Sae(sizes.d_in, sizes.num_latents, sizes.k, device=device, dtype=dtype)
    sae.load_state_dict({ours: tensors[theirs] for ours, theirs in _TENSORS.items()})
    return sae


def read_config(folder: Path) -> SparsifyConfig:
    """The checked cfg.json of a checkpoint; raises `FormatError`."""
    path = folder / CONFIG
    try:
        obj = read_json(path)
    except OSError as error:
        raise FormatError(f"{folder} holds no SAE", expected=f"{CONFIG} and {WEIGHTS}") from error
    if isinstance(obj, dict):  # other versions of sparsify write keys that mean nothing here
        obj = {key: obj[key] for key in obj if key in SparsifyConfig.__dataclass_fields__}
    cfg = parse_dataclass(SparsifyConfig, obj, str(path))
    if cfg.activation != "topk" or cfg.skip_connection or cfg.transcode:
        raise FormatError(f"{path} is not a plain TopK autoencoder", got=obj)
    num_latents = cfg.num_latents or cfg.d_in * cfg.expansion_factor
    if not (cfg.d_in >= 1 and 1 <= cfg.k <= num_latents):
        raise FormatError(f"{path} holds sizes that cannot be", expected="1 <= k <= M", got=obj)
    return cfg
