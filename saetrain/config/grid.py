"""The list of a run's SAEs: every combination of the options given several times, and their names.

Nothing here imports torch: the command line reads it.
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
from saetrain.config.sae import PENALISED
from saetrain.config.sae_options import HookpointOverride, SaeOptions

_HINTS = get_type_hints(SaeOptions)

FIELDS = tuple(field.name for field in dataclasses.fields(SaeOptions))
"""Options of one SAE, in order."""

AXES = tuple(name for name in FIELDS if get_origin(_HINTS[name]) is not tuple)
"""Those that may be given several times. One that is a list is given its one value so."""

_LABELS: dict[str, str] = {
    field.name: field.metadata["label"]
    for field in dataclasses.fields(SaeOptions)
    if field.metadata["label"] is not None
}
"""What stands before a value in a folder's name, where it is not the option's own name."""


def grid(**values: Any) -> tuple[SaeOptions, ...]:
    """Every combination of options of which some have several values; the last varies fastest.

    Args:
        values: for each option a value, or several; none leaves the default.

    Raises:
        ConfigError: a value stands twice, or SAEs would be the same in all but name.
        TypeError: there is no such option.
    """
    axes = {name: _several(name, values[name]) for name in FIELDS if name in values}
    if unknown := values.keys() - axes.keys():
        raise TypeError(f"no options of an SAE: {sorted(unknown)}")
    combinations = itertools.product(*axes.values())
    saes = tuple(SaeOptions(**dict(zip(axes, chosen, strict=True))) for chosen in combinations)
    require_different(saes)
    return saes


def vary(config: FitConfig, **values: Any) -> FitConfig:
    """A configuration with every combination of some options' values, and else as it is.

    `vary(FitConfig(cache, out, k=32), lr=(1e-3, 3e-4), seed=(0, 1))` trains four SAEs at each
    hookpoint. See `grid`.
    """
    saes = grid(**(vars(config.sae) | values))
    return dataclasses.replace(config, **vars(saes[0]), saes=saes if len(saes) > 1 else ())


def _several(name: str, value: Any) -> tuple[Any, ...]:
    if name not in AXES or not isinstance(value, (list, tuple)):
        return (value,)
    if not value or len(set(value)) < len(value):
        raise ConfigError(
            f"{option(name)} needs values that differ", expected="each of them once", got=value
        )
    return tuple(value)


def require_different(saes: Sequence[SaeOptions]) -> None:
    """Refuse a list that holds the same SAE twice; raises `ConfigError`."""
    for sae in saes:
        same = [other for other in saes if _effective(other) == _effective(sae)]
        if len(same) > 1:
            raise ConfigError(
                "two SAEs of the run would be the same",
                expected="options that differ"
                + (" (--expansion-factor means nothing beside --num-latents)" * _by_width(same))
                + (" (--k means nothing where --sparsity decides)" * _by_k(same)),
                got=f"{len(same)} times {sae}",
                remedy="leave one of them out",
            )


def _by_width(saes: Sequence[SaeOptions]) -> bool:
    return len({sae.expansion_factor for sae in saes}) > 1


def _by_k(saes: Sequence[SaeOptions]) -> bool:
    return len({sae.k for sae in saes}) > 1


def _effective(sae: SaeOptions) -> SaeOptions:
    """The options without those that mean nothing beside others."""
    void: dict[str, Any] = {} if sae.num_latents is None else {"expansion_factor": 1}
    if sae.activation in PENALISED:
        void["k"] = 1
    return dataclasses.replace(sae, **void)


def saes_at(config: FitConfig, hookpoint: str) -> dict[str, SaeOptions]:
    """The SAEs of a hookpoint, by what tells each from the others: '' if there is only one.

    Raises:
        ConfigError: two overrides set the same option, or two SAEs are the same.
    """
    plain = config.saes or (config.sae,)
    require_different(plain)
    overridden = [_overridden(sae, config.hookpoints, hookpoint) for sae in plain]
    different = {_effective(sae): sae for sae in reversed(overridden)}  # the first of the same
    saes = list(reversed(different.values()))
    varying = [name for name in FIELDS if len({getattr(sae, name) for sae in saes}) > 1]
    return {_setting(sae, varying): sae for sae in saes}


def _overridden(
    sae: SaeOptions, overrides: Mapping[str, HookpointOverride], hookpoint: str
) -> SaeOptions:
    changes: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for pattern, override in overrides.items():
        if not fnmatchcase(hookpoint, pattern):
            continue
        given = {k: v for k, v in vars(override).items() if v is not None}
        if "expansion_factor" in given:
            given["num_latents"] = None
        for name, value in given.items():
            if name in changes:  # which one wins must not hang on their order in a file
                raise ConfigError(
                    f"two patterns set {name} of {hookpoint}",
                    expected="one of them",
                    got=f"{said_by[name]!r} and {pattern!r}",
                )
            changes[name], said_by[name] = value, pattern
    return dataclasses.replace(sae, **changes)


def require_overrides_used(config: FitConfig, hookpoints: Iterable[str]) -> None:
    """Refuse an override that is of no hookpoint of the run; raises `HookpointError`."""
    names = list(hookpoints)
    for pattern in config.hookpoints:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise HookpointError(
                f"no hookpoint of the run matches {pattern!r}, the pattern of an override",
                expected=" | ".join(names),
                got=pattern,
            )


def _setting(sae: SaeOptions, varying: Sequence[str]) -> str:
    """A folder's name such as k32-lr1e-3-seed0."""
    return "-".join(_part(name, getattr(sae, name)) for name in varying)


def _part(name: str, value: Any) -> str:
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
    """A number as people write it, and no two alike: 0.5, 3e-4, 1e10."""
    if value == 0 or 0.1 <= abs(value) < 1e6:
        return repr(value).removesuffix(".0")
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    mantissa = str(digits[0]) + ("." + "".join(map(str, digits[1:])) if digits[1:] else "")
    return f"{'-' * sign}{mantissa}e{exponent + len(digits) - 1}"


def option(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def values_of(config: FitConfig) -> dict[str, Any]:
    """Every option's value, and a list where the run's SAEs have several."""
    found = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "saes"
    }
    for name in FIELDS:
        values = list(dict.fromkeys(getattr(sae, name) for sae in config.saes))
        if len(values) > 1:
            found[name] = values
    return found
