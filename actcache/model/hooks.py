"""Find the modules of a model that can be hooked, match patterns against them, capture activations.

A hookpoint's name is a module path below the model's base (`layers.9.mlp`). The base's own prefix
(`model.`, `transformer.`, `gpt_neox.`) is optional. The suffix ':in' means the module's input.
Names of other libraries are taken where no module has that name: see `Layout`.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import HookpointError, ModelError
from actcache.format.hookpoint_names import Layout, unknown_hook
from actcache.format.manifest import INPUT, Hookpoint

_PROBE = (2, 8)
"""Shape [B, C] of the probe batch. B = 2, so that tensors without a batch dimension of their own
(position embeddings, rotary angles) are not taken for activations."""


@dataclass(frozen=True)
class HookSite:
    """Shape of a module's input or output, recorded in a probe forward pass."""

    name: str
    width: int | None
    """Size of the last dimension; None if it cannot be hooked."""
    reason: str
    """Reason why it cannot be hooked, a predicate such as 'is not a tensor'; else empty."""


def discover_sites(model: Any) -> dict[str, HookSite]:
    """Run the base model on a small batch and record the shapes of all modules' inputs and outputs.

    Args:
        model: a transformers model, possibly on the meta device.

    Returns:
        Sites by name, in the order of `named_modules`.
    """
    base = model.base_model
    modules = {name: module for name, module in base.named_modules() if name}
    shapes: dict[str, list[Any]] = {s: [] for name in modules for s in (name, f"{name}{INPUT}")}

    def record(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            shapes[name].append(_shape(_first_tensor(output)))
            shapes[f"{name}{INPUT}"].append(_shape(_input_tensor(args, kwargs)))

        return hook

    handles = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        _forward_probe(model, shapes)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _site(name, recorded) for name, recorded in shapes.items()}


def _site(name: str, shapes: list[tuple[int, ...] | None]) -> HookSite:
    if not shapes:
        return HookSite(name, None, "is not called in a forward pass")
    if len(shapes) > 1:
        return HookSite(name, None, f"is called {len(shapes)} times in a forward pass")
    (shape,) = shapes
    if shape is None:
        return HookSite(name, None, "is not a tensor")
    if len(shape) != 3 or shape[:2] != _PROBE:
        text = ", ".join(map(str, shape))
        return HookSite(name, None, f"has shape [{text}], not [batch, ctx, width]")
    return HookSite(name, shape[2], "")


def weights_of_heads(model: Any, names: Iterable[str]) -> set[str]:
    """Return those weights that are never run: outside the base model, or output embeddings."""
    head = model.get_output_embeddings()
    base, out = (
        next((name for name, module in model.named_modules() if module is part), "")
        for part in (model.base_model, head)
    )
    return {
        name
        for name in names
        if (out and name.startswith(f"{out}.")) or (base and not name.startswith(f"{base}."))
    }


def input_device(model: Any) -> torch.device:
    """Return the device of a model's input tokens; meta for a model without weights.

    With --device-map, offloaded weights are on the meta device, so accelerate's hook is consulted
    for the device of execution.
    """
    hook = getattr(model, "_hf_hook", None)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    first: torch.device = next(model.parameters()).device
    return first


def _forward_probe(model: Any, shapes: dict[str, list[Any]]) -> None:
    base, device = model.base_model, input_device(model)
    batch, ctx = _PROBE
    ids = torch.zeros(batch, ctx, dtype=torch.long, device=device)
    # On the meta device models cannot build a mask from values. Most use a mask of four dimensions
    # unchanged; the few that refuse it run without a mask.
    mask = torch.zeros(batch, 1, ctx, ctx, dtype=next(base.parameters()).dtype, device=device)
    with torch.no_grad():
        if device.type != "meta":
            base(ids, use_cache=False)
            return
        try:
            base(ids, attention_mask=mask, use_cache=False)
        except Exception:  # each model has its own error for a mask that it refuses
            for recorded in shapes.values():  # the modules before the error are called again
                recorded.clear()
            base(ids, use_cache=False)


def residual_hookpoints(model: Any, layers: Sequence[int | str], stride: int) -> list[str]:
    """Name the residual-stream hookpoints after the given layers, or after every `stride`-th.

    Args:
        model: a transformers model.
        layers: numbers, from the last layer if negative, or 'middle'.
        stride: distance of the layers if none is given.

    Raises:
        ModelError: the list of layers cannot be identified among the model's modules.
        HookpointError: a layer number is beyond the last.
    """
    path, count = _list_of_layers(model)
    numbers = [count // 2 if layer == "middle" else int(layer) for layer in layers]
    if beyond := [layer for layer in numbers if not -count <= layer < count]:
        raise HookpointError(
            "--layers names a layer that the model does not have",
            expected=f"0 to {count - 1}, or -{count} to -1 from the last, or middle",
            got=", ".join(map(str, beyond)),
        )
    return [f"{path}.{layer % count}" for layer in (numbers or range(0, count, stride))]


def _list_of_layers(model: Any) -> tuple[str, int]:
    """Return the path and the length of the model's list of layers; raises `ModelError`."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    # A vision tower may have as many layers: search the text decoder only.
    text = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    inside = set(text.modules())
    lists = [
        name
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside
    ]
    if count is None or len(lists) != 1:
        raise ModelError(
            "cannot identify the model's layers among its modules",
            expected=f"one list of {count} modules",
            got=", ".join(lists) or "none",
            remedy="name them with --hookpoint; actcache hookpoints MODEL lists them",
        )
    return lists[0], count


_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


def layout_of(model: Any) -> Layout | None:
    """Find the parts of a model that other libraries name; None: it has no list of layers."""
    try:
        layers, count = _list_of_layers(model)
    except ModelError:
        return None
    config = model.config.get_text_config()
    paths = {module: name for name, module in model.base_model.named_modules() if name}
    above = layers.rpartition(".")[0]
    norms = (f"{above}.{norm}".removeprefix(".") for norm in _NORMS)
    return Layout(
        layers,
        count,
        modules=frozenset(paths.values()),
        embedding=paths.get(model.get_input_embeddings(), ""),
        norm=next((norm for norm in norms if norm in paths.values()), ""),
        is_parallel=bool(getattr(config, "use_parallel_residual", False)),
        is_scaled=getattr(config, "residual_multiplier", 1.0) != 1.0,
        is_post_norm=config.model_type == "openai-gpt"
        or not getattr(config, "do_layer_norm_before", True),
    )


def choose(
    patterns: Sequence[str], sites: Mapping[str, HookSite], model: Any
) -> tuple[list[Hookpoint], dict[str, list[str]]]:
    """Return the hookpoints that are meant by names, ours or those of other libraries.

    Args:
        patterns: names or fnmatch patterns.
        sites: result of `discover_sites`.
        model: the model that the sites are of.

    Returns:
        The hookpoints that match any pattern, in natural order without duplicates, and for each
        pattern of another library our names.

    Raises:
        HookpointError: a pattern means nothing in this model, or nothing that can be hooked.
    """
    prefix = model.base_model_prefix
    found = {pattern: select(pattern, sites, model) for pattern in patterns}
    renamed = {
        pattern: [site.name for site in chosen if site.width is not None]
        for pattern, chosen in found.items()
        if not _matching(pattern, sites, prefix)
    }
    return _hookable(found), renamed


def _matching(pattern: str, sites: Mapping[str, HookSite], prefix: str) -> list[HookSite]:
    path = pattern.removeprefix(f"{prefix}.") if prefix else pattern
    inputs = path.endswith(INPUT)
    return [
        site
        for name, site in sites.items()
        if name.endswith(INPUT) == inputs and fnmatchcase(name, path)
    ]


def select(pattern: str, sites: Mapping[str, HookSite], model: Any) -> list[HookSite]:
    """Return the sites whose names match a pattern, including those that cannot be hooked.

    Args:
        pattern: module path or fnmatch pattern; with ':in' at the end it matches inputs only.
        sites: result of `discover_sites`.
        model: the model; the pattern may begin with its base prefix, or be of another library.

    Raises:
        HookpointError: no name matches.
    """
    prefix = model.base_model_prefix
    if matching := _matching(pattern, sites, prefix):
        return matching
    if (layout := layout_of(model)) is not None:
        meant = layout.find(pattern)
        if found := {s.name: s for name in meant for s in _matching(name, sites, "")}:
            return list(found.values())
        if unknown := unknown_hook(pattern, layout):
            raise HookpointError(
                f"{pattern!r} has no equal here: {unknown[0]}",
                expected=unknown[1],
                got=pattern,
                remedy="actcache hookpoints MODEL lists what can be hooked",
            )
    close = _close(pattern, sites, prefix, layout)
    raise HookpointError(
        f"no module of the model matches {pattern!r}",
        expected=f"such as {', '.join(close)}" if close else None,
        got=pattern,
        remedy="actcache hookpoints MODEL lists what can be hooked",
    )


def _close(
    pattern: str, sites: Mapping[str, HookSite], prefix: str, layout: Layout | None
) -> list[str]:
    """Return names that a misspelt one may mean: of the same layer, output or input alike."""
    path = pattern.removeprefix(f"{prefix}.") if prefix else pattern
    names = [site.name for site in sites.values() if site.width is not None]
    names += [name for peers in (layout.peers().values() if layout else ()) for name in peers]
    return difflib.get_close_matches(path, [n for n in names if _may_mean(path, n)], 5, 0.4)


def _may_mean(misspelt: str, name: str) -> bool:
    """Return whether two names agree in their numbers, in ':in', and about in their last part."""
    (numbers, last, is_input), (others, end, is_also) = (
        (re.findall(r"\d+", n), n.removesuffix(INPUT).rpartition(".")[2], n.endswith(INPUT))
        for n in (misspelt, name)
    )
    alike = last == end or difflib.SequenceMatcher(None, last, end).ratio() > 0.6
    return numbers == others and is_input == is_also and alike


def _hookable(selected: Mapping[str, list[HookSite]]) -> list[Hookpoint]:
    found: dict[str, Hookpoint] = {}
    for pattern, chosen in selected.items():
        usable = {site.name: site.width for site in chosen if site.width is not None}
        if not usable:
            raise HookpointError(
                f"{pattern!r} cannot be hooked: it {chosen[0].reason}",
                remedy="actcache hookpoints MODEL lists what can be hooked",
            )
        found |= {name: Hookpoint(name, width) for name, width in usable.items()}
    return [found[name] for name in sorted(found, key=_natural)]


class _StopForward(Exception):  # noqa: N818 (ends the pass after the last hookpoint)
    pass


class ActivationCapture:
    """Forward hooks that copy the activations of hookpoints and stop the pass after the last one.

    Entering the context registers the hooks, leaving it removes them; `run` needs them.
    """

    def __init__(self, model: Any, hookpoints: Sequence[Hookpoint]) -> None:
        self._base = model.base_model
        self._hookpoints = hookpoints
        self._captured: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._chosen: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> ActivationCapture:
        self._handles = [self._register(hookpoint) for hookpoint in self._hookpoints]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(
        self, tokens: Tensor, mask: Tensor | None = None, chosen: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run the model on a batch up to the last hookpoint.

        Args:
            tokens: token ids [B, C] on the model's device.
            mask: 1 for tokens and 0 for padding [B, C]; None: no padding.
            chosen: indices [n] into the B * C token positions to copy; None: all.

        Returns:
            Activations by hookpoint, [n, width] or without `chosen` [B, C, width], in the model's
            dtype.

        Raises:
            HookpointError: a hookpoint was not reached, or had another shape than in the probe.
            ModelError: the forward pass failed.
        """
        self._captured, self._shapes, self._chosen = {}, {}, chosen
        try:
            with torch.inference_mode(), contextlib.suppress(_StopForward):
                if mask is None:
                    self._base(tokens, use_cache=False)
                else:
                    self._base(tokens, attention_mask=mask, use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError,
            ValueError,
            IndexError,
        ) as error:
            raise ModelError(
                f"the model's forward pass failed at {len(tokens)} sequences of {tokens.shape[1]}",
                got=f"{type(error).__name__}: {error}",
                remedy="another --device, --model-dtype or --load-in",
            ) from error
        for hookpoint in self._hookpoints:
            got = self._shapes.get(hookpoint.name)
            if got != (*tokens.shape, hookpoint.width):
                raise HookpointError(
                    f"hookpoint {hookpoint.name} has another shape than in the probe",
                    expected=[*tokens.shape, hookpoint.width],
                    got=got or "no output: it was not reached",
                )
        return self._captured

    def _keep(self, hookpoint: Hookpoint, tensor: Tensor | None) -> None:
        if tensor is not None:  # copied: later modules may add to it in place
            self._shapes[hookpoint.name] = tuple(tensor.shape)
            self._captured[hookpoint.name] = self._copy(tensor)
        if len(self._captured) == len(self._hookpoints):
            raise _StopForward

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._chosen is None or tensor.dim() != 3:  # `run` raises for other shapes
            return tensor.clone()
        return tensor.flatten(0, 1).index_select(0, self._chosen.to(tensor.device))

    def _register(self, hookpoint: Hookpoint) -> Any:
        module = self._base.get_submodule(hookpoint.name.removesuffix(INPUT))

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._keep(hookpoint, _input_tensor(args, kwargs))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self._keep(hookpoint, _first_tensor(output))

        if hookpoint.name.endswith(INPUT):
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)


def _first_tensor(value: Any) -> Tensor | None:
    """Return the tensor, or the first one of a tuple: layers may return more than hidden states."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def _input_tensor(args: Any, kwargs: Any) -> Tensor | None:
    """Return the hidden states from a module's arguments, positional or by keyword."""
    if args:
        return _first_tensor(args)
    return _first_tensor(kwargs.get("hidden_states"))


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders layers.10 after layers.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
