"""What a resumed run computes otherwise than the run that wrote its checkpoint. No torch here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moetrain.config.inherit import flat
from moetrain.config.schema import Config

GROUPS = ("model", "router", "balance", "optim", "train", "data")  # the others change speed, files, or what is shown
SILENT = ("model.name", "router.kernels", "router.record", "router.replay", "train.log_every", "data.cache_dir")


def changed(stored: dict[str, Any], config: Config) -> list[str]:
    """A line for each key whose value differs from the checkpoint's. stored: the configuration in its manifest.

    A key that the checkpoint does not know, because it was written before there was one, is passed over.
    """
    there, here = (_of_groups(config) for config in (stored, asdict(config)))
    differ = [key for key in there if key not in SILENT and (key not in here or here[key] != there[key])]
    return [f"{key} was {there[key]} in the checkpoint and is {here.get(key, 'absent')} now" for key in differ]


def _of_groups(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for group in GROUPS for key, value in flat(config.get(group, {}), f"{group}.").items()}
