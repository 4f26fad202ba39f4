"""Hookpoints: what can be hooked, which of it a pattern means, and capturing it.

Names are module paths below the model's base (`layers.9.mlp`); the base's own prefix (`model.`,
`transformer.`, `gpt_neox.`) may be given or left out. ':in' at the end means the module's input.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from actcache.core.device import input_device
from actcache.errors import HookpointError, ModelError
from actcache.format.manifest import INPUT, Hookpoint

_PROBE = (2, 8)
"""Shape of the probing batch: of 2, so that what does not grow with the batch (position embeddings,
rotary angles) is not taken for activations."""


@dataclass(frozen=True)
class HookSite:
    """A module's input or output, as a probing forward pass saw it."""

    name: str
    width: int | None
    """Length of its last dimension; None when it cannot be hooked."""
    reason: str
    """Why it cannot be hooked; empty when it can."""


def discover_sites(model: Any) -> dict[str, HookSite]:
    """Run the base model once on a few tokens and note every module's input and output.

    Args:
        model: a transformers model; on the meta device nothing is computed.

    Returns:
        Sites by name, in the order of the modules.
    """
    base = model.base_model
    seen: dict[str, list[Any]] = {}
    names = [(name, module) for name, module in base.named_modules() if name]
    with contextlib.ExitStack() as stack:
        for name, module in names:
            hook = _note(name, seen)
            stack.enter_context(_removing(module.register_forward_hook(hook, with_kwargs=True)))
        _forward_probe(model, seen)
    sites = [
        _site(place, seen.get(place, [])) for name, _ in names for place in (name, f"{name}{INPUT}")
    ]
    return {site.name: site for site in sites}


def _note(name: str, seen: dict[str, list[Any]]) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.setdefault(name, []).append(_shape(_first_tensor(output)))
        seen.setdefault(f"{name}{INPUT}", []).append(_shape(_input_tensor(args, kwargs)))

    return hook


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


def _forward_probe(model: Any, seen: dict[str, list[Any]]) -> None:
    base, device = model.base_model, input_device(model)
    batch, ctx = _PROBE
    ids = torch.zeros(batch, ctx, dtype=torch.long, device=device)
    # On the meta device a mask cannot be built from values, but one in four dimensions is taken
    # as it is; a few models refuse that shape, and build none.
    mask = torch.zeros(batch, 1, ctx, ctx, dtype=next(base.parameters()).dtype, device=device)
    with torch.no_grad():
        if device.type != "meta":
            base(ids, use_cache=False)
            return
        try:
            base(ids, attention_mask=mask, use_cache=False)
        except Exception:  # whatever a model says to a mask it does not know
            seen.clear()  # the modules before the refusal are called once more
            base(ids, use_cache=False)


def residual_hookpoints(model: Any, layers: Sequence[int], stride: int) -> list[str]:
    """Hookpoints of the residual stream after layers: the given ones, or every `stride`-th.

    Raises:
        ModelError: the model's list of layers cannot be told.
        HookpointError: a layer number is beyond the last.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    # Beside a vision tower, which may have as many layers, stands the decoder of the text.
    text = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    inside = set(text.modules())
    lists = [
        name
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside
    ]
    if count is None or len(lists) != 1:
        raise ModelError(
            "cannot tell which modules are the model's layers",
            expected=f"one list of {count} modules",
            got=", ".join(lists) or "none",
            remedy="name them with --hookpoint; actcache hookpoints MODEL lists them",
        )
    if beyond := [layer for layer in layers if layer >= count]:
        raise HookpointError(
            "--layers names a layer that the model does not have",
            expected=f"0 to {count - 1}",
            got=", ".join(map(str, beyond)),
        )
    return [f"{lists[0]}.{layer}" for layer in (layers or range(0, count, stride))]


def select(pattern: str, sites: Mapping[str, HookSite], prefix: str) -> list[HookSite]:
    """The places that a name or fnmatch pattern means, usable or not.

    Args:
        pattern: what the user gave; ':in' at the end asks for inputs.
        sites: what `discover_sites` found.
        prefix: the model's base prefix, which the pattern may begin with.

    Raises:
        HookpointError: there are none.
    """
    wanted = pattern.removeprefix(f"{prefix}.") if prefix else pattern
    inputs = wanted.endswith(INPUT)
    found = [
        site
        for name, site in sites.items()
        if name.endswith(INPUT) == inputs and fnmatchcase(name, wanted)
    ]
    if not found:
        usable = [name for name, site in sites.items() if site.width is not None]
        close = difflib.get_close_matches(wanted, usable, n=5, cutoff=0.4)
        raise HookpointError(
            f"no module of the model matches {pattern!r}",
            expected=f"such as {', '.join(close)}" if close else None,
            got=pattern,
            remedy="actcache hookpoints MODEL lists what can be hooked",
        )
    return found


def match(patterns: Sequence[str], sites: Mapping[str, HookSite], prefix: str) -> list[Hookpoint]:
    """The hookpoints that patterns mean, each once, in natural order.

    Args:
        patterns: names or fnmatch patterns.
        sites: what `discover_sites` found.
        prefix: the model's base prefix, which patterns may begin with.

    Raises:
        HookpointError: a pattern matches nothing, or only what cannot be hooked.
    """
    found: dict[str, Hookpoint] = {}
    for pattern in patterns:
        places = select(pattern, sites, prefix)
        usable = {site.name: site.width for site in places if site.width is not None}
        if not usable:
            raise HookpointError(
                f"{pattern!r} cannot be hooked: it {places[0].reason}",
                remedy="actcache hookpoints MODEL lists what can be hooked",
            )
        found |= {name: Hookpoint(name, width) for name, width in usable.items()}
    return [found[name] for name in sorted(found, key=_natural)]


class _StopForward(Exception):  # noqa: N818 (no error: everything asked for has been captured)
    pass


class ActivationCapture:
    """Hooks on a model that keep what passes the hookpoints and stop the pass after the last.

    Use as a context manager; `run` may be called many times inside.
    """

    def __init__(self, model: Any, hookpoints: Sequence[Hookpoint]) -> None:
        self._base = model.base_model
        self._hookpoints = hookpoints
        self._captured: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._chosen: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> ActivationCapture:
        for hookpoint in self._hookpoints:
            module = self._base.get_submodule(hookpoint.name.removesuffix(INPUT))
            if hookpoint.name.endswith(INPUT):
                handle = module.register_forward_pre_hook(
                    self._input_hook(hookpoint), with_kwargs=True
                )
            else:
                handle = module.register_forward_hook(self._output_hook(hookpoint))
            self._handles.append(handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(
        self, tokens: Tensor, mask: Tensor | None = None, chosen: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Activations of a batch of sequences.

        Args:
            tokens: token ids [B, C] on the model's device.
            mask: 1 where there is a token and 0 where there is padding [B, C]; None: no padding.
            chosen: tokens, numbered through all sequences [n], whose activations are wanted.

        Returns:
            By hookpoint, [B, C, width], or [n, width] of those chosen, in the model's type.

        Raises:
            HookpointError: a hookpoint was not reached, or gave another shape than when surveyed.
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
        except (RuntimeError, ValueError, IndexError) as error:  # of kernels that do not fit
            raise ModelError(
                f"the model's forward pass failed at {len(tokens)} sequences of {tokens.shape[1]}",
                got=f"{type(error).__name__}: {error}",
                remedy="another --device, --model-dtype or --load-in",
            ) from error
        for hookpoint in self._hookpoints:
            got = self._shapes.get(hookpoint.name)
            if got != (*tokens.shape, hookpoint.width):
                raise HookpointError(
                    f"hookpoint {hookpoint.name} did not give what it gave when surveyed",
                    expected=[*tokens.shape, hookpoint.width],
                    got=got or "nothing: it was not reached",
                )
        return self._captured

    def _keep(self, hookpoint: Hookpoint, tensor: Tensor | None) -> None:
        if tensor is not None:  # copied, for modules further on may add to it in place
            self._shapes[hookpoint.name] = tuple(tensor.shape)
            self._captured[hookpoint.name] = self._copy(tensor)
        if len(self._captured) == len(self._hookpoints):
            raise _StopForward

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._chosen is None or tensor.dim() != 3:  # `run` refuses another shape
            return tensor.clone()
        return tensor.flatten(0, 1).index_select(0, self._chosen.to(tensor.device))

    def _input_hook(self, hookpoint: Hookpoint) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._keep(hookpoint, _input_tensor(args, kwargs))

        return hook

    def _output_hook(self, hookpoint: Hookpoint) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._keep(hookpoint, _first_tensor(output))

        return hook


def _first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first of a tuple: some layers return more than hidden states."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def _input_tensor(args: Any, kwargs: Any) -> Tensor | None:
    """The hidden states among a module's arguments; Llama passes them to attention by name."""
    if args:
        return _first_tensor(args)
    return _first_tensor(kwargs.get("hidden_states"))


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


@contextlib.contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.10 after layers.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
