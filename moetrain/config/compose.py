"""Compose YAML groups and command-line overrides into the typed `Config`.

A wrong key never passes silently: the error names it and the nearest key that exists.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moetrain.config.data import KINDS
from moetrain.config.plugins import nearest
from moetrain.config.schema import Config
from moetrain.config.values import shown, usual


def config_dir() -> Path:
    """The Hydra groups: beside the package in a wheel, at the top of the repository otherwise."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def load_config(overrides: list[str]) -> Config:
    """The typed configuration of `configs/train.yaml` under `overrides` (Hydra's override grammar).

    Raises ValueError for an unknown key or group and for a value of the wrong type.
    """
    return to_config(compose_yaml(overrides))


def compose_yaml(overrides: list[str]) -> DictConfig:
    """Composed but not yet typed: what `to_config` takes."""
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("train", overrides=list(overrides))
    except (ConfigCompositionException, HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, overrides)) from None


def to_config(composed: DictConfig) -> Config:
    """Check types and names against the schema; plugins' own options are for `check_plugins`."""
    try:
        plain = OmegaConf.create(OmegaConf.to_container(composed))  # forget types, so that added keys are checked too
        typed = OmegaConf.merge(OmegaConf.structured(Config), plain)
        OmegaConf.resolve(typed)
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error, [])) from None
    assert isinstance(config, Config)
    return config


def describe_groups() -> str:
    """Every group and choice, each with the comment that heads its file."""
    lines = []
    for group in sorted(path for path in config_dir().iterdir() if path.is_dir()):
        lines.append(f"{group.name}=")
        for choice in sorted(group.glob("*.yaml")):
            comments = [line for line in choice.read_text().splitlines() if line.startswith("# ")]
            what = next((line[2:] for line in comments if not line.startswith("# @package")), "")
            lines.append(f"  {choice.stem:<18} {what}")
    return "\n".join(lines)


def to_yaml(config: Config) -> str:
    """The resolved configuration, of which `to_config` makes the same again."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _explain(error: Exception, overrides: list[str]) -> str:
    """One sentence for a user out of Hydra's several."""
    text = f"{error}\n{error.__cause__ or ''}"
    group = re.search(r"Could not find '(\w+)/([^']+)'", text)
    if group:
        options = sorted(p.stem for p in (config_dir() / group[1]).glob("*.yaml"))
        return f"{group[1]}={group[2]}: no such choice{nearest(group[2], options)}; choices: {', '.join(options)}"
    if source := _unknown_source(text, overrides):
        return source
    key = _offending_key(text, overrides)
    given = next((override for override in overrides if override.lstrip("+~").split("=")[0] == key), "")
    if "=" not in given and given:
        return f"{given!r} is not of the form key=value"
    if "LexerNoViableAlt" in text or "Ambiguous value" in text or "mismatched input" in text:
        quoted = json.dumps(os.path.expanduser(given.split("=", 1)[1]), ensure_ascii=False)
        return f"{given}: has characters that need quotes; nearest legal value: {shlex.quote(f'{key}={quoted}')}"
    if key is None:
        return text.splitlines()[0]
    if "not in struct" in text or "Could not override" in text or "' not in '" in text or "not found" in text.lower():
        known = known_keys()  # with the default choice of every group
        if key in known:
            of = key.split(".")[0]
            return f"{key}: what {of}= chooses here has no such key; choose another {of}= or leave the key out"
        return f"{key}: no such key{nearest(key, known)}"
    why = str(error.__cause__ or error).splitlines()[0].rstrip(".")
    return f"{key}: {why}{_nearest_value(key, given.partition('=')[2], why)}"


def _nearest_value(key: str, value: str, why: str) -> str:
    """What to write where a value is of the wrong kind, after OmegaConf's reason; nothing if it cannot be told."""
    if "is not a ListConfig" in why:
        near = "[]" if usual(key) == [] else f"[{value}]"
    elif "is not a subclass of" in why or "Cannot assign" in why:
        inside = [known for known in known_keys() if known.startswith(f"{key}.")]
        return f"; it has keys of its own; nearest legal value: {inside[0]}=..." if inside else ""
    elif "could not be converted to Integer" in why and re.fullmatch(r"\d+(\.\d*)?(e\d+)?", value):
        near = str(round(float(value)))
    elif "could not be converted" in why or "Cannot convert" in why or "is not Optional" in why:
        near = value[1:-1] if re.fullmatch(r"\[[\w.-]+\]", value) else shown(usual(key))
    else:
        return ""
    return f"; nearest legal value: {near}"


def _unknown_source(text: str, overrides: list[str]) -> str:
    """What to say of keys given to a source that the composition does not have; nothing if that is not the error."""
    for override in overrides:
        given = re.match(r"\+*data\.(sources|validation)(?:\.(\w+)(?:\.|=\{)|=\{\s*(\w+))", override)
        if given and re.search(rf"full_key: (data\.{given[1]}\.)?{given[2] or given[3]}$", text, re.MULTILINE):
            where, name = given[1], given[2] or given[3]
            new = f"'+data.{where}={{{name}: {{kind: jsonl, path: FILE}}}}'"
            near = f"data={name} before it" if where == "sources" and name in KINDS else new
            return f"data.{where}.{name}: no source of that name is chosen; nearest legal value: {near}"
    return ""


def _offending_key(text: str, overrides: list[str]) -> str | None:
    given = [override.split("=")[0].lstrip("+~") for override in overrides]
    for pattern in (r"full_key: (\S+)", r"Could not override '([^']+)'", r"No match in the defaults list\. .*'(\S+)'"):
        found = re.search(pattern, text)
        if found and found[1]:
            return next((key for key in given if key.startswith(f"{found[1]}.")), found[1])
    mentioned = [key for key in given if key in text]
    return mentioned[0] if mentioned else None


def known_keys() -> list[str]:
    """Every dotted key of the default composition, for suggestions."""
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(OmegaConf.structured(Config)), "")
    with contextlib.suppress(ValueError):
        walk(OmegaConf.to_container(compose_yaml([]), resolve=False), "")
    return keys
