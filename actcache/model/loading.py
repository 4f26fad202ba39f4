"""Load the model, its configuration and tokenizer; fingerprint weights and tokenizer."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from actcache.config import HarvestConfig
from actcache.core.library_errors import full_disk, remedy_of
from actcache.core.process import use_device
from actcache.core.progress import Progress
from actcache.errors import ModelError, shortage_of
from actcache.model.checkpoint import (
    adapter_error,
    check_weights,
    quantized_mismatches,
)
from actcache.model.gguf_header import GgufHeader, read_gguf_header
from actcache.model.hooks import weights_of_heads

_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"


def load_config(config: HarvestConfig) -> Any:
    """Load the model's transformers configuration.

    Raises:
        ModelError: there is none, it is not of a decoder-only language model, or a size in it is
            that of no model.
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.utils import find_adapter_config_file

    _check_local(config)
    with _explained(config, "configuration"):
        adapter = find_adapter_config_file(config.model, revision=config.revision)
    if adapter is not None:
        raise adapter_error(config.model, adapter)
    with _explained(config, "configuration"):
        values = {}
        if config.gguf_file is None:  # `_check_local` has checked its sizes
            values, _ = PretrainedConfig.get_config_dict(config.model, **_source(config))
    _require_possible(config.model, values)  # before lists are made of that many layers
    with _explained(config, "configuration"):
        loaded = AutoConfig.from_pretrained(config.model, **_source(config))
    require_causal_lm(config.model, loaded)
    return loaded


def model_commit(config: HarvestConfig) -> str | None:
    """Return the commit of the Hub model whose configuration was loaded; None: a local folder."""
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils.hub import extract_commit_hash

    if Path(config.model).exists():
        return None
    file = config.gguf_file or "config.json"
    found = try_to_load_from_cache(config.model, file, revision=config.revision)
    commit: str | None = extract_commit_hash(found, None) if isinstance(found, str) else None
    return commit


_MOST = {r"layers?$": 10_000, r"(size|dim|embd|heads|inner|d_model|d_ff|experts)$": 1 << 24}
"""Largest number that a model can have, by the end of its key in a configuration."""


def _require_possible(name: str, values: Mapping[str, Any]) -> None:
    """Raise `ModelError` if a configuration has more layers, or larger ones, than any model."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _require_possible(name, value)
        for pattern, most in _MOST.items():
            is_number = isinstance(value, int | float)
            if is_number and re.search(pattern, key) and not value <= most:
                raise ModelError(
                    f"the configuration of {name} is that of no model",
                    expected=f"{key} of at most {most:,}",
                    got=value,
                    remedy="restore its config.json",
                )


def _require_weights(config: HarvestConfig, loaded: Any) -> None:
    """Raise `ModelError` if a GGUF file describes a much larger model than it has weights for.

    transformers reserves memory for the model that is described, and fills in what is missing.
    """
    header = _gguf_header(config)
    if header is None:
        return
    try:
        parameters = sum(p.numel() for p in load_meta_model(loaded, config).parameters())
    except Exception:  # its code does not support the meta device
        return
    if parameters > 2 * header.elements:  # the embedding may serve as the last layer, too
        raise ModelError(
            f"{config.gguf_file} of {config.model} describes a larger model than its weights",
            expected=f"about {parameters:,} numbers",
            got=f"{header.elements:,}",
            remedy="restore it, or download it again",
        )


def load_tokenizer(config: HarvestConfig) -> Any:
    """Load the model's tokenizer; raises `ModelError`."""
    from transformers import AutoTokenizer

    _check_local(config)
    with _explained(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(config.model, **_source(config))
        # Documents longer than the model's context are cut into sequences: not worth a warning.
        getattr(tokenizer, "deprecation_warnings", {})[_TOO_LONG] = True
        return tokenizer


def load_model(config: HarvestConfig) -> Any:
    """Load the model with its weights, in evaluation mode, on its device or devices.

    Raises:
        ModelError: loading fails, the checkpoint lacks weights, or it does not allow --load-in as
            given.
    """
    from transformers import AutoModelForCausalLM

    loaded = load_config(config)
    _require_weights(config, loaded)
    kwargs = from_pretrained_kwargs(config, loaded)
    device = None if kwargs else use_device(config.device)
    dtype = "auto" if config.model_dtype == "auto" else getattr(torch, config.model_dtype)
    with _explained(config, "weights"):
        model, found = AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_weights` refuses them, and names them all
            **kwargs,
            **_source(config),
        )
    if getattr(model, "is_quantized", False):
        found["mismatched_keys"] |= quantized_mismatches(model)
    if any(found.values()):
        check_weights(config.model, model, found)
    with _explained(config, "weights"):
        if device is not None:  # with `kwargs`, transformers chose the device
            model.to(device)
        return model.eval().requires_grad_(False)


def from_pretrained_kwargs(config: HarvestConfig, model_config: Any) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for quantisation and placement on devices.

    They are empty for a model that is neither quantised nor split over devices.

    Args:
        config: the options.
        model_config: the model's transformers configuration.

    Raises:
        ModelError: a required library is not installed, or --load-in does not fit a checkpoint
            that is stored quantised.
    """
    kwargs: dict[str, Any] = {}
    stored = getattr(model_config, "quantization_config", None)
    _check_stored(config, stored)
    if config.load_in != "none":
        _require(f"--load-in {config.load_in}", "bitsandbytes", "accelerate")
        # bitsandbytes warns at every matrix product that its inputs are rounded.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if stored is None:
            kwargs["quantization_config"] = _quantization(config, model_config)
    if config.device_map == "auto":
        _require("--device-map auto", "accelerate")
        kwargs |= {"device_map": "auto", "offload_folder": config.offload_folder}
        if config.max_memory:
            kwargs["max_memory"] = config.budgets
    elif config.load_in != "none" or stored is not None:
        # Quantised weights cannot be moved to another device after loading.
        kwargs["device_map"] = {"": str(use_device(config.device))}
    return kwargs


def _quantization(config: HarvestConfig, model_config: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if config.load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = model_config.dtype if config.model_dtype == "auto" else config.model_dtype
    # Without bnb_4bit_compute_dtype, float16 models multiply in float32, slowly.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype or torch.float32,
    )


def _check_stored(config: HarvestConfig, stored: Any) -> None:
    """Check that --load-in fits a checkpoint stored quantised; raises `ModelError`."""
    if stored is None:
        return
    values = stored if isinstance(stored, dict) else stored.to_dict()
    bits = next((b for b in ("8bit", "4bit") if values.get(f"load_in_{b}")), None)
    if config.load_in not in ("none", bits):
        raise ModelError(
            f"{config.model} is quantised already",
            expected=f"--load-in none{f' or {bits}' if bits else ''}",
            got=f"--load-in {config.load_in}",
        )
    if bits == "8bit" and config.load_in == "none":
        raise ModelError(
            f"{config.model} holds 8-bit weights, whose activations depend on the batch",
            remedy="--load-in 8bit, which makes every batch the same on resume",
        )


def _require(option: str, *libraries: str) -> None:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{option} needs {' and '.join(missing)}",
            remedy=f"pip install {' '.join(missing)}",
        )


def load_meta_model(model_config: Any, config: HarvestConfig) -> Any:
    """Build the model on the meta device, in bfloat16: shapes without weights.

    Raises:
        Exception: of any type, if the model's code does not support the meta device.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(model_config),  # from_config writes dtype into it
            dtype=torch.bfloat16,
            trust_remote_code=config.trust_remote_code,
        )
    return model.eval()


_NAMES_ONLY = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
"""Keys of a configuration without effect on activations (weights are hashed with their dtype)."""
_UNUSED = _NAMES_ONLY | {
    "bos_token_id",
    "eos_token_id",
    "finetuning_task",
    "id2label",
    "initializer_range",
    "keys_to_ignore_at_inference",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tie_word_embeddings",
    "tokenizer_class",
    "use_cache",
}
"""Keys without effect on activations: names, training, generation, heads. `pad_token_id` is not
among them: positions follow from it in some models."""
_DROPOUT = re.compile(r"(dropout|drop|dropout_prob|dropout_rate)$")
_LARGE = 1 << 30
"""Bytes of weights from which their digest shows its progress."""


def fingerprint_model(model: Any, *, before: bool = False) -> str:
    """Digest the configuration, the weights below the head, and code of the model's repository.

    Only values that differ from the configuration class's defaults are hashed. They matter: the
    same weights give other activations with another epsilon, activation function or attention.

    Args:
        model: model of transformers.
        before: digest what format versions 1 and 2 do: also heads, which are never run, and all of
            the configuration, and no code.
    """
    values = _deciding(model.config.to_diff_dict(), _NAMES_ONLY if before else _UNUSED)
    values["attention"] = getattr(model.config, "_attn_implementation", None)
    state = sorted(model.state_dict().items())
    if not before:
        unneeded = weights_of_heads(model, model.state_dict())
        state = [(name, tensor) for name, tensor in state if name not in unneeded]
        if code := _remote_code(*model.modules()):
            values["code"] = code
    digest = xxhash.xxh3_128(json.dumps(values, sort_keys=True, default=str).encode())
    # Buffers outside the state dict are computed from the configuration.
    size = sum(tensor.nbytes for _, tensor in state)
    bar = Progress("digest weights", size, "B") if size >= _LARGE else None
    for name, tensor in state:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = _on_cpu(model, name, tensor).contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
        if bar is not None:
            bar.advance(tensor.nbytes)
    if bar is not None:
        bar.close()
    return digest.hexdigest()


def _deciding(values: Mapping[str, Any], unused: Collection[str]) -> dict[str, Any]:
    """Return a configuration without the keys that have no effect on activations."""
    if unused is _NAMES_ONLY:
        return {key: value for key, value in values.items() if key not in unused}
    return {
        key: _deciding(value, unused) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in unused and not _DROPOUT.search(key)
    }


def _remote_code(*objects: Any) -> dict[str, str]:
    """Return the digest, by class, of the Python files of a repository that define objects."""
    found = {}
    for kind in {kind for each in objects for kind in type(each).__mro__}:
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if kind.__module__.startswith("transformers_modules.") and file is not None:
            found[kind.__qualname__] = xxhash.xxh3_128_hexdigest(Path(file).read_bytes())
    return found


def _on_cpu(model: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the state dict on the CPU, loading it alone if it is offloaded."""
    if tensor.device.type != "meta":
        return tensor.detach().cpu()
    from accelerate.utils import align_module_device

    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    try:
        with align_module_device(module, torch.device("cpu")):
            present: torch.Tensor = getattr(module, leaf).detach()
    except ValueError as error:  # its shape; `from_pretrained` does not read offloaded weights
        raise ModelError(
            f"the weight {name} of the checkpoint does not fit the model",
            got=error,
            remedy="restore the config.json that belongs to the checkpoint",
        ) from error
    return present


_NO_IDS = {"version", "truncation", "padding", "decoder"}
"""Parts of a serialised tokenizer that decide no token ids: no call here truncates or pads."""
_NO_IDS_OF_PYTHON = {
    "added_tokens_decoder",  # digested with their flags
    "backend",
    "chat_template",
    "clean_up_tokenization_spaces",
    "is_local",
    "local_files_only",
    "model_max_length",
    "name_or_path",
    "padding_side",
    "processor_class",
    "special_tokens_map_file",
    "tokenizer_class",
    "tokenizer_file",
    "truncation_side",
}
"""Arguments of a tokenizer written in Python that decide no token ids."""


def fingerprint_tokenizer(tokenizer: Any, *, chat: bool = False) -> str:
    """Digest all of a tokenizer that decides token ids.

    That is its class and the whole serialised tokenizer: normaliser, pre-tokeniser, model,
    post-processor, added tokens with their flags. Names, padding, truncation and decoding are left
    out.

    Args:
        tokenizer: tokenizer of transformers.
        chat: also digest the chat templates, and the padding token if one reads it.
    """
    values: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special_tokens": dict(tokenizer.special_tokens_map),
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        values |= _python_tokenizer(tokenizer)
    else:
        parts = json.loads(backend.to_str())
        values["parts"] = {name: part for name, part in parts.items() if name not in _NO_IDS}
    if code := _remote_code(tokenizer):
        values["code"] = code
    if chat:
        values["templates"] = tokenizer.chat_template
    if not chat or "pad_token" not in str(tokenizer.chat_template):
        # Without chats it is a field of the identity; settings of padding set it too.
        values["special_tokens"].pop("pad_token", None)
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True, default=str).encode())


def _python_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Describe a tokenizer that has no serialised form: vocabulary, files and arguments."""
    arguments = dict(getattr(tokenizer, "init_kwargs", {}))
    files = {}
    for name in getattr(tokenizer, "vocab_files_names", {}):
        path = arguments.pop(name, None) or getattr(tokenizer, name, None)
        if isinstance(path, str) and Path(path).is_file():
            files[name] = xxhash.xxh3_128_hexdigest(Path(path).read_bytes())
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        "vocabulary": tokenizer.get_vocab(),
        "added_tokens": {number: repr(token) for number, token in added.items()},
        "files": files,
        "arguments": {k: v for k, v in arguments.items() if k not in _NO_IDS_OF_PYTHON},
    }


def fingerprint_tokenizer_before(tokenizer: Any, *, chat: bool = False) -> str:
    """Digest what format versions 1 and 2 do: vocabulary, special tokens, ids of a probe text."""
    probe = "The quick brown fox, naïve café — 12345\n\tdef f(x): return x**2  "
    digest = xxhash.xxh3_128()
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    digest.update(repr(tokenizer(probe)["input_ids"]).encode())
    if chat:
        digest.update(str(tokenizer.chat_template).encode())
    return digest.hexdigest()


def dtype_name(model: Any) -> str:
    """Return the dtype of the model's arithmetic, such as 'bfloat16'.

    It is the dtype of the first weights with at least 2 bytes per number: quantised weights have
    fewer, and are dequantised to the dtype of the others.
    """
    types = (p.dtype for p in model.parameters())
    first = next(t for t in types if t.is_floating_point and t.itemsize > 1)
    return str(first).removeprefix("torch.")


def _source(config: HarvestConfig) -> dict[str, Any]:
    names = {"revision": config.revision, "gguf_file": config.gguf_file}
    given = {name: value for name, value in names.items() if value is not None}
    return {"trust_remote_code": config.trust_remote_code, **given}


def _check_local(config: HarvestConfig) -> None:
    """Raise `ModelError` for a missing local folder, which transformers would seek on the hub."""
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
    _gguf_header(config)


def _gguf_header(config: HarvestConfig) -> GgufHeader | None:
    """Check the sizes in the GGUF file before it is parsed; raises `ModelError`."""
    if config.gguf_file is None:
        return None
    from transformers.utils import cached_file

    with _explained(config, "GGUF file"):
        path = cached_file(config.model, config.gguf_file, revision=config.revision)
        return read_gguf_header(Path(path))


@contextlib.contextmanager
def _explained(config: HarvestConfig, what: str) -> Iterator[None]:
    """Convert every exception to `ModelError`; hide progress bars if stderr is not a terminal."""
    from transformers.utils import logging as transformers_logging

    quiet: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if not sys.stderr.isatty():  # the GGUF reader's bar cannot be disabled: redirect stderr
        transformers_logging.disable_progress_bar()
        quiet = contextlib.redirect_stderr(io.StringIO())
    report, logger = _Report(), logging.getLogger("transformers.modeling_utils")
    logger.addFilter(report)
    try:
        with quiet:
            yield
    except ModelError:
        raise
    except Exception as error:  # transformers, its hub client and parsers raise many types
        if (shortage := full_disk(error, "HF_HOME") or shortage_of(error)) is not None:
            raise shortage from None
        hint = "; an offload_folder is --offload-folder" if config.device_map == "auto" else ""
        raise ModelError(
            f"cannot load the {what} of {config.model}",
            got=f"{type(error).__name__}: {error}{report.text}",
            remedy=remedy_of(error)
            or f"check the name, --revision and --gguf-file; gated models need a login{hint}",
        ) from error
    finally:
        logger.removeFilter(report)


class _Report(logging.Filter):
    """The table of weights that transformers logs, and that its errors point to.

    It is not printed otherwise: `check_weights` names the same weights.
    """

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the table without its colours; let other records pass."""
        text = record.getMessage()
        if "LOAD REPORT" not in text:
            return True
        self.text = "\n" + re.sub("\x1b\\[[0-9;]*m", "", text)
        return False


_LOADER = "AutoModelForCausalLM"
_BIDIRECTIONAL = {"bert-generation", "xlnet"}
"""Bidirectional models that transformers has no masked-LM class for."""


def require_causal_lm(name: str, model_config: Any) -> None:
    """Refuse models that are not decoder-only language models.

    Multimodal models are accepted if transformers can load them, or their text model, as a causal
    language model: they run on text alone.

    Args:
        name: the model's name, for the message.
        model_config: its transformers configuration.

    Raises:
        ModelError: the model is of another kind, which the message names.
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
    if _LOADER in (getattr(config, "auto_map", None) or {}):  # its own code defines a causal LM
        return ""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type in _BIDIRECTIONAL
    if masked and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False)):
        return "an encoder, in which every token attends to later ones"
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ""
    if config.sub_configs:
        return "a multimodal model"
    return "not a language model that predicts the next token"
