"""The model and its tokenizer: found, loaded, fingerprinted. Errors name what to do."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from actcache.config import HarvestConfig
from actcache.core.device import choose_device
from actcache.errors import ModelError
from actcache.model.quantization import from_pretrained_kwargs


def load_config(config: HarvestConfig) -> Any:
    """The model's transformers configuration.

    Raises:
        ModelError: it cannot be found, or is of a kind whose hidden states are not one stream.
    """
    from transformers import AutoConfig

    _check_local(config)
    with _explained(config, "configuration"):
        loaded = AutoConfig.from_pretrained(config.model, **_source(config))
    require_causal_lm(config.model, loaded)
    return loaded


def load_tokenizer(config: HarvestConfig) -> Any:
    """The model's tokenizer; raises `ModelError`."""
    from transformers import AutoTokenizer

    _check_local(config)
    with _explained(config, "tokenizer"):
        return AutoTokenizer.from_pretrained(config.model, **_source(config))


def load_model(config: HarvestConfig) -> Any:
    """The model with its weights, in evaluation mode, on its device or devices.

    Raises:
        ModelError: it cannot be loaded, or not as the options ask.
    """
    from transformers import AutoModelForCausalLM

    placed = from_pretrained_kwargs(config, load_config(config))
    device = None if placed else choose_device(config.device)
    dtype = "auto" if config.model_dtype == "auto" else getattr(torch, config.model_dtype)
    with _explained(config, "weights"):
        model = AutoModelForCausalLM.from_pretrained(
            config.model, dtype=dtype, **placed, **_source(config)
        )
        if device is not None:  # otherwise transformers has placed it already
            model.to(device)
        return model.eval().requires_grad_(False)


def load_meta_model(model_config: Any, config: HarvestConfig) -> Any:
    """The model on the meta device, in bfloat16: shapes without weights.

    Raises:
        Exception: whatever a model raises that cannot be built there.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(model_config),  # it writes the type into the configuration
            dtype=torch.bfloat16,
            trust_remote_code=config.trust_remote_code,
        )
    return model.eval()


_NAMES_ONLY = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
"""Keys of a configuration that compute nothing (the weights' types are digested themselves)."""


def fingerprint_model(model: Any) -> str:
    """Digest of all that the model computes with: configuration and weights.

    The configuration counts where it differs from its class's defaults: the same weights give
    other activations with another epsilon, activation function or attention.
    """
    told = {k: v for k, v in model.config.to_diff_dict().items() if k not in _NAMES_ONLY}
    told["attention"] = getattr(model.config, "_attn_implementation", None)
    digest = xxhash.xxh3_128(json.dumps(told, sort_keys=True, default=str).encode())
    # Buffers that are not in the state follow from the configuration.
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = _present(model, name, tensor).contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _present(model: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the state on the CPU; one that is offloaded is brought in, it alone."""
    if tensor.device.type != "meta":
        return tensor.detach().cpu()
    from accelerate.utils import align_module_device

    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    with align_module_device(module, torch.device("cpu")):
        found: torch.Tensor = getattr(module, leaf).detach()
    return found


def fingerprint_tokenizer(tokenizer: Any, *, chat: bool = False) -> str:
    """Digest of the vocabulary, special tokens, and of how a probe text is cut.

    Args:
        tokenizer: of transformers.
        chat: whether its chat template counts too.
    """
    probe = "The quick brown fox, naïve café — 12345\n\tdef f(x): return x**2  "
    digest = xxhash.xxh3_128()
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    digest.update(repr(tokenizer(probe)["input_ids"]).encode())
    if chat:
        digest.update(str(tokenizer.chat_template).encode())
    return digest.hexdigest()


def dtype_name(model: Any) -> str:
    """Type of the model's arithmetic, such as 'bfloat16'.

    That of its first weights with 2 bytes or more to a number: quantised ones have fewer, and are
    decoded to the type of the others.
    """
    types = (p.dtype for p in model.parameters())
    first = next(t for t in types if t.is_floating_point and t.itemsize > 1)
    return str(first).removeprefix("torch.")


def _source(config: HarvestConfig) -> dict[str, Any]:
    source: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        source["revision"] = config.revision
    if config.gguf_file is not None:
        source["gguf_file"] = config.gguf_file
    return source


def _check_local(config: HarvestConfig) -> None:
    """Transformers answers a missing folder with advice on hub logins: say it plainly first."""
    path = Path(config.model)
    if config.gguf_file is not None and path.is_dir() and not (path / config.gguf_file).is_file():
        found = sorted(p.name for p in path.glob("*.gguf"))
        raise ModelError(
            f"{config.model} holds no file {config.gguf_file}",
            expected=" | ".join(found) or "a .gguf file",
            got=config.gguf_file,
            remedy="name one of them with --gguf-file",
        )
    if not path.exists() and config.model.startswith((".", "/", "~")):
        raise ModelError(f"no such model folder: {config.model}")


@contextlib.contextmanager
def _explained(config: HarvestConfig, what: str) -> Iterator[None]:
    """Turn whatever transformers raises into a `ModelError`, and keep its bars off a pipe."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    quiet: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if not sys.stderr.isatty():  # the GGUF reader draws a bar that no setting turns off
        logging.disable_progress_bar()
        quiet = contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            yield
    except Exception as error:  # transformers, its hub client and its parsers raise anything
        spread = "; an offload_folder is --offload-folder" if config.device_map == "auto" else ""
        raise ModelError(
            f"cannot load the {what} of {config.model}",
            got=f"{type(error).__name__}: {error}",
            remedy=f"check the name, --revision and --gguf-file; gated models need a login{spread}",
        ) from error


_LOADER = "AutoModelForCausalLM"
_BIDIRECTIONAL = {"bert-generation", "xlnet"}
"""Encoders that have no head for masked words."""


def require_causal_lm(name: str, model_config: Any) -> None:
    """Refuse models that are not decoder-only language models.

    Models of text and images are taken where transformers loads them, or their text part, as a
    causal language model: they run on the text alone.

    Args:
        name: what the user calls the model.
        model_config: its transformers configuration.

    Raises:
        ModelError: it is of another kind, which the message names.
    """
    if kind := _other_kind(model_config):
        raise ModelError(
            f"{name} is {kind}",
            expected="a decoder-only language model",
            got=type(model_config).__name__,
            remedy="harvest its language model alone, saved as a model of its own"
            if kind == "a multimodal model"
            else None,
        )


def _other_kind(config: Any) -> str:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder model"
    if _LOADER in (getattr(config, "auto_map", None) or {}):  # code of its own, which knows better
        return ""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type in _BIDIRECTIONAL
    if masked and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False)):
        return "an encoder, in which every token sees those behind it"
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ""
    if config.sub_configs:
        return "a multimodal model"
    return "not a language model that predicts the next token"
