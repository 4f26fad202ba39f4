"""Options of `saetrain fit` from a file: TOML, YAML, or the run.json of a run.

Keys are option names, with hyphens or underscores. An option of a single SAE may be a list; every
combination is trained. Tables below `hookpoints` override k, lr or width for the hookpoints that
match a name or pattern:

    cache = "demo/cache"
    k = [16, 32]
    [hookpoints."layers.1*"]
    k = 64
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from actcache.core.json_codec import parse_value, read_json
from actcache.errors import ConfigError, FormatError
from saetrain.config.fit_config import NEWEST_DEFAULTS, FitConfig
from saetrain.config.grid import AXES, values_of, vary
from saetrain.config.sae import HookpointOverride

Options = dict[str, Any]
"""Values by field name; a list where an option of a single SAE has several values."""

_HINTS = {k: v for k, v in get_type_hints(FitConfig).items() if k not in ("saes", "hookpoints")}

_ALTERNATIVES = {
    "expansion_factor": ("num_latents",),
    "num_latents": ("expansion_factor",),
    "epochs": ("max_tokens",),
    "buffer_bytes": ("pool_rows",),
    "pool_rows": ("buffer_bytes",),
}
"""Options that exclude each other: one on the command line replaces the other in a file."""


def read_options(path: Path, also: Mapping[str, Any] | None = None) -> Options:
    """Read options from a file.

    Args:
        path: .toml, .yaml, .yml, or .json: a run's run.json, or an object of options.
        also: further keys that are allowed, with the types of their values.

    Raises:
        ConfigError: the file cannot be read, has an unknown key, or a value of the wrong type.
        FormatError: the file is a damaged run.json.
    """
    obj = _load(path)
    if path.suffix == ".json" and "cache_id" in obj:
        return _of_run(path)
    hints = _HINTS | dict(also or {})
    keys = _fields(obj, [*hints, "hookpoints"], str(path))
    options: Options = {}
    for key, name in keys.items():
        where = f"{path}: {key}"
        if name == "hookpoints":
            options[name] = _overrides(obj[key], where)
        elif obj[key] is not None:  # YAML's null: the default
            options[name] = _value(hints[name], obj[key], where, several=name in AXES)
    return options


def merge(file: Options, line: Options) -> Options:
    """Merge options; those of the command line replace others, also per-hookpoint overrides."""
    hidden = {name for given in line for name in (given, *_ALTERNATIVES.get(given, ()))}
    kept = {name: value for name, value in file.items() if name not in hidden}
    overrides = {
        pattern: dataclasses.replace(override, **dict.fromkeys(hidden & vars(override).keys()))
        for pattern, override in file.get("hookpoints", {}).items()
    }
    remaining = {
        pattern: override
        for pattern, override in overrides.items()
        if override != HookpointOverride()
    }
    return kept | line | {"hookpoints": remaining}


def make_config(options: Options) -> FitConfig:
    """Build the configuration from options.

    Raises:
        ConfigError: --out or CACHE is missing, or a value is invalid.
    """
    for name, shown in (("cache", "CACHE"), ("out", "--out")):
        if options.get(name) is None:
            raise ConfigError(
                f"{shown} is missing", expected="on the command line, or in the file of --config"
            )
    several = {k: v for k, v in options.items() if k in AXES and isinstance(v, list)}
    first = {name: values[0] for name, values in several.items() if values}
    rest = {name: value for name, value in options.items() if name not in several}
    return vary(FitConfig(**rest, **first), **several)


def _of_run(path: Path) -> Options:
    """Return the options of a run, to resume it or to start another with them."""
    from saetrain.runs.record import read_run  # NumPy

    record = read_run(path.parent)
    options = values_of(record.options) | {"cache": record.cache, "out": str(path.parent)}
    del options["resume"], options["force_config"]
    if record.defaults_version != NEWEST_DEFAULTS:
        options["defaults"] = record.defaults_version
    given = {name: value for name, value in options.items() if value is not None}
    if record.options.saes and make_config(given).saes != record.options.saes:
        raise ConfigError(
            f"the SAEs of {path} are not every combination of some options",
            expected="a run that was started with options given several times",
            remedy="start it from Python, as before",
        )
    return given


def _load(path: Path) -> dict[str, Any]:
    kinds: dict[str, Callable[[Path], object]] = {
        ".toml": lambda path: tomllib.loads(path.read_text(encoding="utf-8")),
        ".yaml": _yaml,
        ".yml": _yaml,
        ".json": read_json,
    }
    if path.suffix not in kinds:
        raise ConfigError(f"--config {path} has an unknown file type", expected=" | ".join(kinds))
    try:
        obj = kinds[path.suffix](path)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read", got=error.strerror) from error
    except (ValueError, FormatError) as error:
        raise ConfigError(f"--config {path} is damaged", got=error) from error
    if obj is None:  # an empty YAML file
        return {}
    if not isinstance(obj, dict) or not all(isinstance(key, str) for key in obj):
        raise ConfigError(f"--config {path} holds no mapping of options", got=type(obj).__name__)
    return obj


def _yaml(path: Path) -> object:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Safe loader that rejects duplicate keys; YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := {str(key) for key in keys if keys.count(key) > 1}:
                raise ValueError(f"duplicate key {', '.join(sorted(twice))}")
            mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 # a safe loader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _fields(obj: Mapping[str, Any], known: Iterable[str], where: str) -> dict[str, str]:
    """Map keys to fields; raise `ConfigError` for unknown keys, or two keys of one field."""
    fields = {key: key.replace("-", "_") for key in obj}
    options = [name.replace("_", "-") for name in known]
    for key, name in fields.items():
        if name.replace("_", "-") not in options:
            (nearest,) = difflib.get_close_matches(name.replace("_", "-"), options, 1, 0.0)
            raise ConfigError(
                f"{where} has an unknown key",
                expected="the options of saetrain fit",
                got=key,
                remedy=f"perhaps {nearest}",
            )
        if list(fields.values()).count(name) > 1:
            raise ConfigError(f"{where} has {key} twice, with a hyphen and an underscore")
    return fields


def _overrides(obj: object, where: str) -> dict[str, HookpointOverride]:
    if not isinstance(obj, dict):
        raise ConfigError(f"{where} is not a table", expected='[hookpoints."PATTERN"]', got=obj)
    hints = get_type_hints(HookpointOverride)
    found = {}
    for pattern, table in obj.items():
        name = f"{where}.{pattern!r}"
        if not isinstance(table, dict):
            raise ConfigError(f"{name} is not a table", expected="k, lr or a width", got=table)
        keys = _fields(table, hints, name)
        values = {n: _value(hints[n], table[key], f"{name}: {key}") for key, n in keys.items()}
        found[str(pattern)] = HookpointOverride(**values)
    return found


def _value(hint: Any, obj: Any, where: str, several: bool = False) -> Any:
    """Parse a value by an option's type; with `several`, each item of a list."""
    if several and isinstance(obj, list):
        return [_value(hint, item, where) for item in obj]
    if get_origin(hint) is tuple and not isinstance(obj, list):
        obj = [obj]
    if isinstance(obj, str) and (hint is float or float in get_args(hint)):
        with contextlib.suppress(ValueError):
            obj = float(obj)  # YAML reads 1e-3 as text, because it lacks a decimal point
    if hint is str and type(obj) in (int, float):  # --encoder-scale takes a number or "auto"
        obj = repr(obj)
    try:
        return parse_value(hint, obj, where)
    except FormatError as error:
        raise ConfigError(error.what, expected=error.expected, got=error.got) from error
