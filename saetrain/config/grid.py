"""Expansion of options that are given several times into the named SAEs of a run.

Imports no torch: the command line reads it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any, get_origin, get_type_hints

from actcache.errors import ConfigError, HookpointError
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import PENALISED, HookpointOverride, SaeOptions, flag

_HINTS = get_type_hints(SaeOptions)

FIELDS = tuple(field.name for field in dataclasses.fields(SaeOptions))
"""Names of the options of one SAE, in order."""

AXES = tuple(name for name in FIELDS if get_origin(_HINTS[name]) is not tuple)
"""Names of the options that may be given several times: all but those whose value is a list."""

_LABELS: dict[str, str] = {
    field.name: field.metadata["label"]
    for field in dataclasses.fields(SaeOptions)
    if field.metadata["label"] is not None
}
"""Labels of options in folder names, where they differ from the option's own name."""


def grid(**values: Any) -> tuple[SaeOptions, ...]:
    """Expand options with several values into all combinations; the last option varies fastest.

    Args:
        values: for each option its value, or a list or tuple of values. Options that are not
            given keep their default.

    Raises:
        ConfigError: a value is repeated, or two combinations describe the same SAE.
        TypeError: an option does not exist.
    """
    axes = {name: _several(name, values[name]) for name in FIELDS if name in values}
    if unknown := values.keys() - axes.keys():
        raise TypeError(f"unknown options of an SAE: {sorted(unknown)}")
    combinations = itertools.product(*axes.values())
    saes = tuple(SaeOptions(**dict(zip(axes, chosen, strict=True))) for chosen in combinations)
    require_different(saes)
    return saes


def vary(config: FitConfig, **values: Any) -> FitConfig:
    """Return the configuration with every combination of the given options' values.

    `vary(FitConfig(cache, out, k=32), lr=(1e-3, 3e-4), seed=(0, 1))` trains four SAEs at each
    hookpoint. See `grid`.
    """
    if not isinstance(config, FitConfig):
        raise ConfigError("config has another type", expected="FitConfig", got=type(config))
    saes = grid(**(vars(config.sae) | values))
    return dataclasses.replace(config, **vars(saes[0]), saes=saes if len(saes) > 1 else ())


def _several(name: str, value: Any) -> tuple[Any, ...]:
    if name not in AXES or not isinstance(value, (list, tuple)):
        return (value,)
    if not value or any(value.count(item) > 1 for item in value):
        raise ConfigError(
            f"{flag(name)} needs distinct values", expected="each value once", got=value
        )
    return tuple(value)


def require_different(saes: Sequence[SaeOptions]) -> None:
    """Reject a list that contains the same SAE twice; raises `ConfigError`."""
    groups: dict[SaeOptions, list[SaeOptions]] = {}
    for sae in saes:
        groups.setdefault(_effective(sae), []).append(sae)
    for same in groups.values():
        if len(same) > 1:
            raise ConfigError(
                "two SAEs of the run would be the same",
                expected="options that differ"
                + " (--num-latents overrides --expansion-factor)"
                * _differ(same, "expansion_factor")
                + " (--k is unused with --sparsity)" * _differ(same, "k"),
                got=f"{len(same)} times {same[0]}",
                remedy="omit one of them",
            )


def _differ(saes: Iterable[SaeOptions], name: str) -> bool:
    return len({getattr(sae, name) for sae in saes}) > 1


def _effective(sae: SaeOptions) -> SaeOptions:
    """Return the options with those set to 1 that have no effect beside others."""
    unused: dict[str, Any] = {} if sae.num_latents is None else {"expansion_factor": 1}
    if sae.activation in PENALISED:
        unused["k"] = 1
    return dataclasses.replace(sae, **unused)


def saes_at(config: FitConfig, hookpoint: str) -> dict[str, SaeOptions]:
    """Return the SAEs of a hookpoint by their folder name below it: '' if there is only one.

    A folder name, such as k32-lr1e-3, lists the options in which the SAEs differ.

    Raises:
        ConfigError: two overrides set the same option, or two SAEs are equal.
    """
    plain = config.saes or (config.sae,)
    require_different(plain)
    overridden = [_overridden(sae, config.hookpoints, hookpoint) for sae in plain]
    distinct = {_effective(sae): sae for sae in reversed(overridden)}  # the first of equal ones
    saes = list(reversed(distinct.values()))
    varying = [name for name in FIELDS if _differ(saes, name)]
    # Such as k32-lr1e-3-seed0.
    return {"-".join(_component(n, getattr(sae, n)) for n in varying): sae for sae in saes}


def _overridden(
    sae: SaeOptions, overrides: Mapping[str, HookpointOverride], hookpoint: str
) -> SaeOptions:
    changes: dict[str, Any] = {}
    pattern_of: dict[str, str] = {}
    for pattern, override in overrides.items():
        if not fnmatchcase(hookpoint, pattern):
            continue
        given = {k: v for k, v in vars(override).items() if v is not None}
        if "expansion_factor" in given:
            given["num_latents"] = None
        for name, value in given.items():
            if name in changes:  # the result must not depend on their order in a file
                raise ConfigError(
                    f"two patterns set {name} of {hookpoint}",
                    expected="one of them",
                    got=f"{pattern_of[name]!r} and {pattern!r}",
                )
            changes[name], pattern_of[name] = value, pattern
    return dataclasses.replace(sae, **changes)


def require_overrides_used(config: FitConfig, hookpoints: Iterable[str]) -> None:
    """Reject an override that matches no hookpoint of the run; raises `HookpointError`."""
    names = list(hookpoints)
    for pattern in config.hookpoints:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise HookpointError(
                f"the override pattern {pattern!r} matches no hookpoint of the run",
                expected=" | ".join(names),
                got=pattern,
            )


def _component(name: str, value: Any) -> str:
    label = _LABELS.get(name, name.replace("_", "-"))
    if isinstance(value, bool):
        return label if value else f"no-{label}"
    if isinstance(value, str):
        return f"{label}-{value}" if name in _LABELS else value
    if value is None:
        return f"{label}-default"
    if isinstance(value, tuple):
        return label + "+".join(map(str, value))
    return label + (str(value) if isinstance(value, int) else short_number(value))


def short_number(value: float) -> str:
    """Format a number in short, distinct notation: 0.5, 3e-4, 1e10."""
    if value == 0 or 0.1 <= abs(value) < 1e6:
        return repr(value).removesuffix(".0")
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    mantissa = str(digits[0]) + ("." + "".join(map(str, digits[1:])) if digits[1:] else "")
    return f"{'-' * sign}{mantissa}e{exponent + len(digits) - 1}"


def values_of(config: FitConfig) -> dict[str, Any]:
    """Return every option's value by name; a list where the run's SAEs have several values."""
    found = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "saes"
    }
    for name in FIELDS:
        values = list(dict.fromkeys(getattr(sae, name) for sae in config.saes))
        if len(values) > 1:
            found[name] = values
    return found
