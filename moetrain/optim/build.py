"""From the `optim` group of the configuration to an optimizer and its schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Parameter

from moetrain.config.plugins import build_plugin
from moetrain.optim.schedule import Schedule


def build_optimizer(
    optim: Mapping[str, Any], named_parameters: list[tuple[str, Parameter]]
) -> tuple[torch.optim.Optimizer, Schedule]:
    """optim: the group's node, with the schedule as its `schedule`. Raises ValueError naming the option at fault."""
    options = dict(optim)
    if "schedule" not in options:
        raise ValueError("optim.schedule is missing; nearest legal value: the schedule of configs/optim/adamw.yaml")
    schedule = build_plugin("optim.schedule", options.pop("schedule"))
    return build_plugin("optim", options, named_parameters=named_parameters), schedule
