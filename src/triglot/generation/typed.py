"""Arguments that are of the types that a call says; others are refused in words before any work."""

import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from triglot.errors import ConfigError, require

P = ParamSpec("P")
T = TypeVar("T")
NUMBERS: dict[Any, type] = {int: numbers.Integral, float: numbers.Real}
"""What passes for a number: NumPy's, too."""
WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "truths"),
    str: ("a text", "texts"),
    Path: ("a path", "paths"),
    type(None): ("None", ""),
}
"""What one is called, and several are."""
NO_LISTS = (str, bytes, Mapping, Set)
"""What can be gone through, too, but as characters, or in no order that a caller could mean."""


def typed(call: Callable[P, T]) -> Callable[P, T]:
    """The call, for arguments of the types that it says; where that is a list, any iterable is read once into one."""

    @wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        hints, given = get_type_hints(call), inspect.signature(call).bind(*args, **kwargs)
        for name, value in given.arguments.items():
            hint = hints.get(name, Any)
            if isinstance(value, Iterable) and any(map(_is_list, _options(hint))):
                given.arguments[name] = value = value if isinstance(value, (Sequence, *NO_LISTS)) else list(value)
            require_type(name, value, hint)
        return call(*given.args, **given.kwargs)

    return checked


def require_types(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first of the values that is not of its type."""
    for name, value in values.items():
        require_type(name, value, hints[name])


def require_type(name: str, value: Any, hint: Any) -> None:
    """Raise ConfigError for a value of another type, or for the first of its parts that is of another one."""
    fitting = [one for one in _options(hint) if _fits(value, one)]
    require(bool(fitting), name, words(hint), value, ConfigError)
    for one in fitting:
        if _is_list(one):
            for number, item in enumerate(value):
                require_type(f"{name}[{number}]", item, get_args(one)[0])
        elif get_origin(one) is Mapping:
            for key, item in value.items():
                require_type(f"a key of {name}", key, get_args(one)[0])
                require_type(f"{name}[{key!r}]", item, get_args(one)[1])


def words(hint: Any, several: bool = False) -> str:
    """What a type is called in a message."""
    parts, options = get_args(hint), _options(hint)
    if len(options) > 1:
        told = list(filter(None, (words(one, several) for one in options)))
        return " or ".join([", ".join(told[:-1]), told[-1]] if told[1:] else told)
    if get_origin(hint) is Literal:
        return " or ".join(parts) if len(parts) == 2 else f"one of {', '.join(parts)}"
    if _is_list(hint):
        return f"{'lists' if several else 'a list'} of {words(parts[0], several=True)}"
    if get_origin(hint) is Mapping:
        to = "" if parts[1] is Any else f" from {words(parts[0], several=True)} to {words(parts[1], several=True)}"
        return f"{'dicts' if several else 'a dict'}{to}"
    return WORDS[hint][several] if hint in WORDS else f"a {hint.__module__}.{hint.__name__}"


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is Sequence


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, whatever its parts are."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if _is_list(hint):
        return isinstance(value, Sequence) and not isinstance(value, NO_LISTS)
    if isinstance(value, bool):  # which are whole numbers to Python
        return hint in (bool, Any)
    return hint is Any or isinstance(value, NUMBERS.get(hint, get_origin(hint) or hint))
