"""What any value must be, whatever its key: finite numbers, and no value in the place of keys. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moetrain.config.schema import Config

OFF_AT_0 = ("train.max_grad_norm", "train.max_loss", "run.hang_timeout_s")  # 0 says what infinity would


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError naming the key and the nearest legal value unless low <= value <= high (NaN never is)."""
    if not low <= value <= high:
        nearest = high if value > high else low
        raise ValueError(f"{name} is {value}, outside [{low}, {high}]; the nearest legal value is {nearest}")


def require_above_0(name: str, value: float, nearest: float) -> None:
    """Raise ValueError naming the key and `nearest` unless value > 0 (NaN is not)."""
    if not value > 0:
        raise ValueError(f"{name} is {value}, not above 0; the nearest legal value is {nearest}")


def check_values(config: Config) -> None:
    """Raise ValueError for the first key whose value is NaN or infinite, or is one value where keys belong."""
    for key, node in _groups(config):
        if not isinstance(node, Mapping):
            raise _no_group(key, node)
    for key, number in _floats(asdict(config)):
        if not math.isfinite(number):
            nearest = 0 if key in OFF_AT_0 else shown(usual(key))
            raise ValueError(f"{key}={number} is not a finite number; nearest legal value: {nearest}")


def _groups(config: Config) -> list[tuple[str, Any]]:
    """What has keys of its own inside a plugin group."""
    groups = [(f"{name}.{key}", v) for name in ("balance", "tracker") for key, v in getattr(config, name).items()]
    groups += [(f"dispatch.{key}", config.dispatch.get(key) or {}) for key in ("capacity", "placement")]
    groups.append(("router.rounding", config.router.get("rounding") or {}))
    return [*groups, ("optim.schedule", config.optim.get("schedule", {}))]


def _no_group(key: str, value: Any) -> ValueError:
    known = usual(key)
    first = next((name for name in known if name != "_target_"), None) if isinstance(known, Mapping) else None
    removable = key.startswith(("balance.", "tracker."))
    if value is None and removable:
        nearest = f"~{key}"
    elif first and isinstance(value, (int, float)) and not isinstance(value, bool):
        nearest = f"{key}.{first}={value}"
    else:
        nearest = f"{key}.{first or '_target_'}=..."
    return ValueError(f"{key}={shown(value)} is one value, but has keys of its own; nearest legal value: {nearest}")


def usual(key: str) -> Any:
    """What the default composition has at a dotted key; 0 where it has nothing, as in a group chosen otherwise."""
    from moetrain.config.compose import load_config  # for a message only

    node: Any = asdict(load_config([]))
    for part in key.split("."):
        node = node.get(part, 0) if isinstance(node, Mapping) else 0
    return node


def _floats(node: Any, key: str = "") -> list[tuple[str, float]]:
    """Every float below `node` and its dotted key; a list's entries share the list's."""
    if isinstance(node, Mapping):
        return [found for name, value in node.items() for found in _floats(value, f"{key}.{name}" if key else name)]
    if isinstance(node, (list, tuple)):
        return [found for value in node for found in _floats(value, key)]
    return [(key, node)] if isinstance(node, float) else []


def shown(value: Any) -> str:
    """As it is written on the command line."""
    return json.dumps(value, default=str)
