"""What a run says about itself before its first step."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moetrain.config.schema import Config
from moetrain.mesh.layout import Layout
from moetrain.plan.params import count


def describe(config: Config, layout: Layout, device: str, step: int, experts: str = "") -> dict[str, Any]:
    """Label -> text for the console. device: its type. step: the one that the run continues from.

    experts: what experts=auto chose and why, if anything.
    """
    parameters = count(config.model)
    degrees = {**layout.attention, **layout.expert}
    return {
        "model": f"{config.model.name}: {parameters.total:,} parameters, {parameters.active:,} active",
        "ranks": f"{layout.world} on {device}",
        "layout": " ".join(f"{axis}={size}" for axis, size in degrees.items() if size > 1) or "one rank",
        **({"experts": experts} if experts else {}),
        "run": config.run.dir,
        "from": f"step {step}",
        "train": " ".join(f"{k}={v}" for k, v in asdict(config.train).items()),
    }
