"""Compare the weights that a model needs with those that its checkpoint holds.

transformers draws what a checkpoint lacks at random, and continues. Such rows look like any others,
so here a missing or misshapen weight is an error with its likely cause.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from actcache.errors import ModelError
from actcache.model.hooks import weights_of_heads

_SHOWN = 4  # names of weights in a message
_ADAPTER = re.compile(r"(^|\.)(lora_|base_layer\.|adapter_|ia3_|hada_|prompt_encoder)")
_WRAPPERS = "_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_WRAPPER = re.compile(rf"(^|\.)((?:{_WRAPPERS})\.)+")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")

_log = logging.getLogger(__name__)


def check_weights(name: str, model: Any, found: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model that was not loaded whole, and log the weights that it does not use.

    A missing head (the layer that predicts tokens) is no error: it is never run. It is removed from
    the model, so that its random weights do not enter the fingerprint.

    Args:
        name: name of the model, for messages.
        model: the model, as `from_pretrained` returns it.
        found: its `output_loading_info`.

    Raises:
        ModelError: the checkpoint lacks weights, or holds them in other shapes.
    """
    if found["mismatched_keys"]:
        raise _other_shapes(name, found["mismatched_keys"])
    unused = sorted(found["unexpected_keys"])
    missing = _sorted_by_layer(found["missing_keys"])
    unneeded = weights_of_heads(model, missing)
    needed = [key for key in missing if key not in unneeded]
    if needed:
        cause, remedy = _cause(needed, unused, model)
        raise ModelError(
            f"the checkpoint of {name} lacks {len(needed)} of the weights that the model needs: "
            f"{_some(needed)}",
            expected=f"{len(model.state_dict())} weights, all of them in the checkpoint",
            got=cause,
            remedy=remedy,
        )
    for key in missing:
        module, _, leaf = key.rpartition(".")
        delattr(model.get_submodule(module), leaf)
    if unused:
        _log.warning("%s: %d weights are not used: %s", name, len(unused), _some(unused))


def quantized_mismatches(model: Any) -> set[tuple[str, Any, Any]]:
    """Return the quantised weights of another shape than their layer, which transformers accepts.

    Returns:
        The weight's name, its shape in the checkpoint, and that of the layer, [out, in].
    """
    found = set()
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        # Of bitsandbytes: weights that other libraries pack have shapes of their own.
        if isinstance(layer, nn.Linear) and type(weight).__name__ in ("Params4bit", "Int8Params"):
            stored: Any = getattr(weight, "quant_state", None) or weight
            shape, wanted = tuple(stored.shape), (layer.out_features, layer.in_features)
            if shape != wanted:
                found.add((f"{name}.weight", shape, wanted))
    return found


def adapter_error(name: str, config_file: str) -> ModelError:
    """Return the error for a folder or repository with an adapter (PEFT), such as LoRA weights.

    Whether transformers applies one depends on the libraries that are installed.

    Args:
        name: name of the model.
        config_file: path of its adapter_config.json.
    """
    text = Path(config_file).read_text(errors="replace")
    base = re.search(r'"base_model_name_or_path":\s*"([^"]*)"', text)
    return ModelError(
        f"{name} holds an adapter",
        expected="a whole model",
        got=f"adapter_config.json, of an adapter of {base[1]}" if base else "adapter_config.json",
        remedy=_MERGE,
    )


_MERGE = (
    "merge the adapter first, with peft: PeftModel.from_pretrained(model, ADAPTER)"
    ".merge_and_unload().save_pretrained(FOLDER); then harvest FOLDER. If it is merged, delete "
    "adapter_config.json"
)


def _other_shapes(name: str, mismatched: Iterable[tuple[str, Any, Any]]) -> ModelError:
    shapes = {key: (tuple(stored), tuple(wanted)) for key, stored, wanted in mismatched}
    lines = [
        f"{key}: {list(shapes[key][0])} in the checkpoint, {list(shapes[key][1])} by the "
        "configuration"
        for key in _sorted_by_layer(shapes)
    ]
    return ModelError(
        f"{len(lines)} weights of {name} have another shape than its configuration says",
        got="\n".join(lines),
        remedy="restore the config.json that belongs to the checkpoint",
    )


def _cause(keys: list[str], others: list[str], model: Any) -> tuple[str, str]:
    """Return the likely cause for missing weights, and its remedy."""
    if any(_ADAPTER.search(key) for key in others):
        return f"weights of an adapter: {_some(others)}", _MERGE
    needed, unused = dict.fromkeys(keys), dict.fromkeys(others)
    for other in unused:
        if (plain := _WRAPPER.sub(r"\1", other)) != other and plain in needed:
            return f"names with the prefix of a wrapper, such as {other}", f"rename it {plain}"
        if inner := _ending(other, needed):
            prefix = other.removesuffix(inner)
            return f"names that begin with {prefix!r}, such as {other}", f"remove {prefix!r}"
    for key in needed:
        if inner := _ending(key, unused):
            prefix = key.removesuffix(inner)
            return f"names without {prefix!r}, such as {inner}", f"put {prefix!r} before them"
    loaded = _layers(set(model.state_dict()) - set(needed))
    lacking = _layers(needed)
    if lacking and loaded and min(lacking) > max(loaded):
        return (
            f"{max(loaded) + 1} layers; the configuration says {max(lacking) + 1}",
            "restore the config.json that belongs to the checkpoint, or the rest of its weights",
        )
    if unused:
        return (
            f"{len(others)} weights that the model has no use for: {_some(others)}",
            "restore the config.json that belongs to the checkpoint: these are the names of "
            "another architecture, or of another version of this one",
        )
    names = dict.fromkeys(_LAYER.split(key, maxsplit=1)[-1] for key in needed)
    if len(loaded) > 1 and len(needed) == len(names) * len(loaded):
        return (
            f"layers without {_some(list(names))}",
            "restore the config.json that belongs to the checkpoint: this one is of another "
            "architecture, or differs in a setting such as attention_bias",
        )
    return "a part of the weights", "save or download the checkpoint again"


def _ending(name: str, names: Collection[str]) -> str:
    """Return the longest part of a dotted name, up to its end, that is one of `names`; else ''."""
    parts = name.split(".")
    return next((end for i in range(1, len(parts)) if (end := ".".join(parts[i:])) in names), "")


def _layers(keys: Iterable[str]) -> Counter[int]:
    """Count the weights of each layer, by the first number in their names."""
    return Counter(int(found[1]) for key in keys if (found := _LAYER.search(key)))


def _sorted_by_layer(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=lambda key: [part.zfill(6) for part in key.split(".")])


def _some(keys: list[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
