"""Where a model's weights go and in how many bits: arguments for `from_pretrained`."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from actcache.config import HarvestConfig
from actcache.core.device import choose_device
from actcache.errors import ModelError


def from_pretrained_kwargs(config: HarvestConfig, model_config: Any) -> dict[str, Any]:
    """What `from_pretrained` is told beyond name and type; empty for a plain load.

    Args:
        config: the options.
        model_config: the model's transformers configuration.

    Raises:
        ModelError: a library that this needs is not installed, or the checkpoint holds weights of
            a kind that must be asked for.
    """
    found: dict[str, Any] = {}
    stored = getattr(model_config, "quantization_config", None)
    _check_stored(config, stored)
    if config.load_in != "none":
        _require(f"--load-in {config.load_in}", "bitsandbytes", "accelerate")
        # It says with every product that its inputs are rounded.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if stored is None:
            found["quantization_config"] = _quantization(config, model_config)
    if config.device_map == "auto":
        _require("--device-map auto", "accelerate")
        found |= {"device_map": "auto", "offload_folder": config.offload_folder}
        if config.max_memory:
            found["max_memory"] = config.budgets
    elif config.load_in != "none" or stored is not None:
        # Quantised weights are made for a device and cannot be moved to it afterwards.
        found["device_map"] = {"": str(choose_device(config.device))}
    return found


def _quantization(config: HarvestConfig, model_config: Any) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if config.load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    told = model_config.dtype if config.model_dtype == "auto" else config.model_dtype
    # Unless told, products of float16 run in float32, slowly.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=told or torch.float32,
    )


def _check_stored(config: HarvestConfig, stored: Any) -> None:
    """Whether the options fit a checkpoint that is quantised already; raises `ModelError`."""
    if stored is None:
        return
    told = stored if isinstance(stored, dict) else stored.to_dict()
    bits = next((b for b in ("8bit", "4bit") if told.get(f"load_in_{b}")), None)
    if config.load_in not in ("none", bits):
        raise ModelError(
            f"{config.model} is quantised already",
            expected=f"--load-in none{f' or {bits}' if bits else ''}",
            got=f"--load-in {config.load_in}",
        )
    if bits == "8bit" and config.load_in == "none":
        raise ModelError(
            f"{config.model} holds 8-bit weights, with which a row depends on its batch",
            remedy="--load-in 8bit, which keeps the batches the same",
        )


def _require(option: str, *libraries: str) -> None:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{option} needs {' and '.join(missing)}",
            remedy=f"pip install {' '.join(missing)}",
        )
