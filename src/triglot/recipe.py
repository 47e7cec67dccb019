"""Recipes in TOML, and configs to plain values and back."""

import dataclasses
import json
import tomllib
import types
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from triglot.config import RunConfig
from triglot.errors import ConfigError, require

T = TypeVar("T")


def _require(holds: bool, name: str, rule: str, value: Any) -> None:
    require(holds, name, rule, value, ConfigError)


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build a config from nested plain values; unknown keys, missing keys and wrong types are named by dotted path."""
    hints = get_type_hints(cls)
    fields = {field.name.rstrip("_"): field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # of a dataclass
    for key in values:
        meant = "".join(f" (perhaps {close})" for close in get_close_matches(key, fields, 1))
        _require(key in fields, f"{path}{key}", f"one of {', '.join(fields)}{meant}", key)
    for key, field in fields.items():
        given = key in values or field.default is not dataclasses.MISSING
        _require(given, f"{path}{key}", "given", None)
    plain = {
        fields[key].name: _convert(hints[fields[key].name], value, f"{path}{key}") for key, value in values.items()
    }
    try:
        return cls(**plain)
    except ConfigError as error:  # it names a field of `cls`
        raise ConfigError(str(error).replace("`", f"`{path}", 1)) from None


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        _require(isinstance(value, Mapping), path, "a table", value)
        return from_dict(kind, value, f"{path}.")  # type: ignore[arg-type]  # of a dataclass
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        _require(value in args, path, f"one of {', '.join(map(str, args))}", value)
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is tuple:
        _require(isinstance(value, list | tuple), path, "a list", value)
        of = [args[0]] * len(value) if args[-1] is ... else list(args)
        _require(len(of) == len(value), path, f"a list of {len(of)}", value)
        return tuple(_convert(one, item, f"{path}[{i}]") for i, (one, item) in enumerate(zip(of, value, strict=True)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(
        type(value) is kind,
        path,
        {"str": "a string", "int": "a whole number"}.get(kind.__name__, f"a {kind.__name__}"),
        value,
    )
    return value


def _convert_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [one for one in args if one is not type(None)]
    for one in options[:-1]:
        try:
            return _convert(one, value, path)
        except ConfigError:
            continue
    return _convert(options[-1], value, path)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain values, every field spelled out; `from_dict` reads it back."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain[field.name.rstrip("_")] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return plain


def flat(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested tables as one, keys dotted."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        values |= flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return values


def load_config(path: Path) -> RunConfig:
    """Read a run's config.json."""
    return from_dict(RunConfig, json.loads(path.read_text(encoding="utf-8")))


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, or lie in the repository that it runs from, by name."""
    package = Path(__file__).parent
    folders = (package.parents[1] / "recipes", package / "recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a recipe in TOML and apply overrides of the form `train.max_steps=100`, values read as TOML or as text."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # with a byte order mark or without
    except OSError as error:
        raise ConfigError(f"`recipe` must be a file that can be read, but is {str(path)!r} instead.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"`recipe` must be TOML in UTF-8, but {path} is not: {error}.") from error
    for override in overrides:
        _override(values, override)
    return from_dict(RunConfig, _with_model_of_init(values))


def _with_model_of_init(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the model of the run that it starts from, where it does not say what kind of model it has."""
    init, model = values.get("init"), values.get("model", {})
    if not isinstance(init, dict) or not isinstance(init.get("from"), str) or "kind" in model:
        return values
    path = Path(init["from"]) / "config.json"
    rule = "a run's folder (`triglot convert` makes one of another library's checkpoint)"
    _require(path.is_file() and path.with_name("checkpoints").is_dir(), "init.from", rule, init["from"])
    return values | {"model": merged(to_dict(load_config(path).model), model)}


def merged(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """One nested table over another."""
    both = {name: (table.get(name), value) for name, value in over.items()}
    return dict(table) | {
        name: merged(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else new
        for name, (old, new) in both.items()
    }


def overridden(config: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    """The config with overrides as for `load_recipe`."""
    values = to_dict(config)
    for override in overrides:
        _override(values, override)
    return from_dict(RunConfig, values)


def _override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    _require(bool(equals) and bool(dotted), "--set", "of the form a.b=value", override)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None if text == "none" else text
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        _require(isinstance(values, dict), "--set", "a path through tables", override)
    values[key] = value
