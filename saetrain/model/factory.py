"""From an SAE's configuration to the module."""

from __future__ import annotations

import torch

from saetrain.config.sae import SaeConfig
from saetrain.model.activations import Activation, BatchTopK, Gated, GroupMax, JumpRelu, Relu, TopK
from saetrain.model.sae import Sae


def build_sae(
    config: SaeConfig,
    *,
    unit: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Sae:
    """An SAE with initial weights.

    Args:
        config: its kind.
        unit: root of the variance of the rows it reads, in which thresholds are given.
        seed: seed of the initial weights.
        device: where the weights live.
        dtype: their type.
    """
    return Sae(
        config.d_in,
        config.num_latents,
        config.k,
        activation=_activation(config, unit, device, dtype),
        d_out=config.d_out,
        transcode=config.transcode,
        skip_connection=config.skip_connection,
        seed=seed,
        device=device,
        dtype=dtype,
    )


def _activation(
    config: SaeConfig, unit: float, device: torch.device | str, dtype: torch.dtype
) -> Activation:
    if config.activation == "batchtopk":
        return BatchTopK(config.k, device)
    if config.activation == "groupmax":
        return GroupMax(config.k)
    if config.activation == "jumprelu":
        threshold, bandwidth = config.threshold * unit, config.bandwidth * unit
        return JumpRelu(config.num_latents, threshold, bandwidth, device=device, dtype=dtype)
    if config.activation == "relu":
        return Relu()
    if config.activation == "gated":
        return Gated(config.num_latents, device=device, dtype=dtype)
    return TopK(config.k)
