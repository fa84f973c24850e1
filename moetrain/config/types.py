"""Whether a plugin's option is of the type that its constructor annotates. No torch here."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from moetrain.config.values import shown, usual


def check_type(key: str, value: Any, hint: Any, default: Any) -> None:
    """Raise ValueError unless `value` is what a plugin's annotation asks for; one not known here asks nothing.

    default: the option's (`inspect.Parameter.empty` without one), the nearest legal value where `value` says
    nothing nearer.
    """
    wanted = _unmet(value, hint)
    if wanted:
        near = _near(value, hint, usual(key) if default is inspect.Parameter.empty else default)
        raise ValueError(f"{key}={shown(value)} is not {wanted}; nearest legal value: {shown(near)}")


def _unmet(value: Any, hint: Any) -> str:
    """What `hint` wants that `value` is not, or nothing."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        wanted = [_unmet(value, choice) for choice in inner]
        return " or ".join(wanted) if all(wanted) else ""
    if hint is type(None):
        return "" if value is None else "null"
    if hint is bool:
        return "" if isinstance(value, bool) else "true or false"
    if hint is int:
        return "" if isinstance(value, int) and not isinstance(value, bool) else "an integer"
    if hint is float:
        return "" if isinstance(value, (int, float)) and not isinstance(value, bool) else "a number"
    if hint is str:
        return "text" if value is None or isinstance(value, (Mapping, list, tuple)) else ""
    if origin is tuple and Ellipsis not in inner:
        fits = isinstance(value, (list, tuple)) and len(value) == len(inner)
        return "" if fits and not any(map(_unmet, value, inner)) else f"a list of {len(inner)} ({_names(inner)})"
    if origin in (list, tuple, Sequence):
        fits = isinstance(value, (list, tuple)) and not any(_unmet(entry, inner[0]) for entry in value)
        return "" if fits else f"a list (of {_names(inner[:1])})"
    if origin in (dict, Mapping):
        return "" if isinstance(value, Mapping) else "a group of keys"
    return ""


def _names(hints: Sequence[Any]) -> str:
    return ", ".join(getattr(hint, "__name__", str(hint)) for hint in hints)


def _near(value: Any, hint: Any, default: Any) -> Any:
    """The nearest value that `hint` takes, as far as one can be told."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    candidates = [[value], round(value) if isinstance(value, float) and math.isfinite(value) else None, default]
    if isinstance(value, (list, tuple)) and len(value) == 1:
        candidates.insert(0, value[0])
    for candidate in candidates:
        if candidate is not None and not all(_unmet(candidate, choice) for choice in choices):
            return candidate
    return default
