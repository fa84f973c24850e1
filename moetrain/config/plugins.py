"""Build what a YAML's `_target_` names. Concrete plugins are named nowhere else but in tests."""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from moetrain.config.schema import Config
from moetrain.config.types import check_type

PLUGIN_GROUPS = ("router", "balance", "dispatch", "experts", "optim", "tracker")
SEVERAL = ("balance", "tracker")  # of which a run may have several, each below its name
# Keys beside a plugin's own options: for every router (observe/tape.py), for every dispatcher (moe/capacity.py,
# moe/placement.py).
ROUTER_KEYS = ("record", "replay")
DISPATCH_KEYS = ("capacity", "placement")


def router_options(router: Mapping[str, Any]) -> dict[str, Any]:
    """The `router` group without the keys that are not the plugin's."""
    return {key: value for key, value in router.items() if key not in ROUTER_KEYS}


def dispatch_options(dispatch: Mapping[str, Any]) -> dict[str, Any]:
    """The `dispatch` group without the keys that are not the plugin's."""
    return {key: value for key, value in dispatch.items() if key not in DISPATCH_KEYS}


def build_plugin(where: str, node: Mapping[str, Any], **runtime: Any) -> Any:
    """Call the node's `_target_` with its options and with `runtime`, which the caller knows (shapes, groups).

    where: the node's key in the configuration, for messages. Raises ValueError for options that are unknown, missing,
    or refused by the plugin itself.
    """
    check_options(where, node)
    target = resolve(where, node["_target_"])
    options = {key: value for key, value in node.items() if key != "_target_"}
    try:
        inspect.signature(target).bind(**options, **runtime)
    except TypeError as error:
        raise ValueError(f"{where}: {node['_target_']}: {error}") from None
    try:
        return target(**options, **runtime)
    except ValueError as error:  # a plugin knows its options, not where in the configuration it is
        first = re.match(r"\w*", str(error))
        own = inspect.signature(target).parameters.keys() - runtime.keys()
        if first and first[0] in own:
            raise ValueError(f"{where}.{error}") from error
        raise


def check_plugins(config: Config) -> None:
    """Check every plugin group's options against the constructors they name. Imports the plugins, hence torch."""
    for group in PLUGIN_GROUPS:
        node = getattr(config, group)
        for where, plugin in [(f"{group}.{k}", v) for k, v in node.items()] if group in SEVERAL else [(group, node)]:
            if "_target_" not in plugin:
                choose = f"{group}={where.rpartition('.')[2] if group in SEVERAL else '...'}"
                raise ValueError(
                    f"{where} has no _target_; nearest legal value: a choice, {choose} (`moetrain methods`)"
                )
        check_options(group, router_options(node) if group == "router" else node)


def check_options(where: str, node: Mapping[str, Any]) -> None:
    """Check, without calling it, that `_target_` exists and takes the options it is given, by name and by the type that
    it annotates; nested plugins too."""
    nested = {key: value for key, value in node.items() if isinstance(value, Mapping)}
    for key, value in nested.items():
        check_options(f"{where}.{key}", value)
    if "_target_" not in node:
        return
    target = resolve(where, node["_target_"])
    parameters, hints = inspect.signature(target).parameters, _hints(target)
    for key in (node.keys() & parameters.keys() & hints.keys()) - {"_target_"}:
        if not (key in nested and "_target_" in nested[key]):
            check_type(f"{where}.{key}", node[key], hints[key], parameters[key].default)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in node:
        built_elsewhere = key in nested and "_target_" in nested[key]
        if key != "_target_" and key not in parameters and not built_elsewhere:
            raise ValueError(f"{where}.{key}: {node['_target_']} has no such option{nearest(key, list(parameters))}")


def _hints(target: Any) -> dict[str, Any]:
    """The annotations of what a `_target_` is called with; none where they cannot be evaluated."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):  # names of a module that is imported for type checkers only
        return {}


def resolve(where: str, target: str) -> Any:
    """The object a dotted `_target_` names. Raises ValueError when there is none."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}._target_={target!r} cannot be imported: {error}") from None


def nearest(key: str, options: list[str]) -> str:
    """A "did you mean" for the option closest to `key`, or nothing."""
    close = [option for option in options if option.endswith(f".{key}")]  # its group was left out
    same = [option for option in options if option.endswith(f".{key.rpartition('.')[2]}")]  # another group's
    close = close or (same if len(same) == 1 else [])
    close = close or difflib.get_close_matches(key, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
