"""Reading another library's config.json: numbers that are numbers, and nothing that is computed otherwise here."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from triglot.interop.tensors import require_file

T = TypeVar("T", int, float, bool, str)
KINDS = {int: "a whole number above 0", float: "a number", bool: "true or false", str: "a text"}


def setting(values: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    """A setting, or the default where it is left out or null; CheckpointError where it is of another kind."""
    value = values.get(name)
    if value is None and default is not None:
        return default
    if kind is float and type(value) is int:
        value = float(value)
    require_file(type(value) is kind and not (type(value) is int and value < 1), name, KINDS[kind], value)
    return cast(T, value)


def expect(values: Mapping[str, Any], **accepted: tuple[Any, ...]) -> None:
    """Refuse settings by name that are none of those that are computed here; one that is left out or null is fine."""
    for name, fine in accepted.items():
        value = values.get(name)
        among = any(type(value) is type(one) and value == one for one in fine)
        require_file(value is None or among, name, f"one of {', '.join(map(repr, fine))}", value)
