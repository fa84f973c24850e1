"""What a step directory says about itself."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from moetrain.checkpoint import manifest
from moetrain.config.compose import to_config
from moetrain.config.schema import Config


def stored_config(path: Path) -> Config:
    """The configuration of a step directory. Raises ValueError when its manifest has none."""
    config = manifest.read(path).get("config")
    if not config:
        raise ValueError(f"{path} does not say which model it holds (no config in its manifest)")
    return to_config(OmegaConf.create(config))
