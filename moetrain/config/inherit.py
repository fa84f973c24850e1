"""A run that starts from a checkpoint's weights has that checkpoint's model. No torch here.

The user need not repeat its shapes: `train init.from=CKPT` takes model, router, balance losses, and tokenizer from it.
What the command line or an experiment says about the model must agree; routers and balance losses may be chosen anew.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

from moetrain.config.compose import load_config
from moetrain.config.plugins import ROUTER_KEYS
from moetrain.config.schema import Config

_FREE = ("model.name", "model.init_std")  # change no function


def inherit(config: Config, stored: Config, overrides: list[str], source: str) -> Config:
    """`config`, composed of `overrides`, with what it leaves open taken from `stored`, the configuration of `source`.

    A key counts as given if an override names it (or its group) or if its value is not the default one. Raises
    ValueError for a given model key that differs from the checkpoint's.
    """
    default, result = load_config([]), deepcopy(config)
    given, there, usual = (flat(asdict(c.model), "model.") for c in (config, stored, default))
    for key, value in given.items():
        named = _named(overrides, key) or value != usual[key]
        if named and value != there[key] and key not in _FREE:
            raise ValueError(
                f"{key}={value} differs from the model in init.from={source}; nearest legal value: {there[key]} "
                "(or give no model keys: the checkpoint's are taken)"
            )
    free = {
        key: given[f"model.{key}"] for key in ("name", "init_std") if given[f"model.{key}"] != usual[f"model.{key}"]
    }
    result.model = replace(deepcopy(stored.model), **free)
    if stored.model.moe.n_experts:
        result.router = _router(config, stored, default, overrides)
        if config.balance == default.balance and not _named(overrides, "balance"):
            result.balance = deepcopy(stored.balance)
    for key in ("tokenizer", "eos_token"):
        if result.data.tokenizer != stored.data.tokenizer and key == "eos_token":
            break  # another tokenizer's
        if getattr(config.data, key) == getattr(default.data, key) and not _named(overrides, f"data.{key}"):
            setattr(result.data, key, getattr(stored.data, key))
    return result


def _router(config: Config, stored: Config, default: Config, overrides: list[str]) -> dict[str, Any]:
    """The run's own router if it chose one, else the checkpoint's; options given by name win over either's."""
    chose = _named(overrides, "router", exactly=True) or config.router["_target_"] != default.router["_target_"]
    router = dict(config.router if chose else {**stored.router, **{key: config.router[key] for key in ROUTER_KEYS}})
    for key in router.keys() - {"_target_", *ROUTER_KEYS}:
        if _named(overrides, f"router.{key}", exactly=True):
            router[key] = config.router[key]
        elif key in stored.router:
            router[key] = stored.router[key]
    return router


def _named(overrides: list[str], key: str, exactly: bool = False) -> bool:
    """Whether an override sets `key`, something in it, or (unless exactly) something that it is in."""
    for override in overrides:
        name = override.split("=")[0].lstrip("+~")
        if name == key or (not exactly and (key.startswith(f"{name}.") or name.startswith(f"{key}."))):
            return True
    return False


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as one dotted key each, behind `prefix`."""
    dotted: dict[str, Any] = {}
    for key, value in node.items():
        dotted |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return dotted
