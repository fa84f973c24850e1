"""Lifecycle of `moetrain train`: compose -> typed configuration -> validate -> ranks -> Trainer -> fit.

torch is imported only once the configuration is accepted, so a refusal takes a second, on any machine.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moetrain.comm.env import world_size
from moetrain.comm.parent import die_with_launcher
from moetrain.config.compose import load_config
from moetrain.config.inherit import inherit
from moetrain.config.plugins import check_plugins
from moetrain.config.schema import Config
from moetrain.config.validate import check_init, validate

if TYPE_CHECKING:
    from moetrain.trainer import Trainer


def train(overrides: list[str]) -> None:
    """Run to the end. Raises ValueError for what the user must change, before ranks or GPUs are touched if possible."""
    die_with_launcher()
    with running(run_config(overrides)) as trainer:
        trainer.fit()


def run_config(overrides: list[str]) -> Config:
    """The configuration of a run; with `init.from` with that checkpoint's model or, to be resumed, the run's own."""
    config = load_config(overrides)
    check_init(config)
    source = config.init.get("from", "")
    if not source:
        return config
    from moetrain.checkpoint.same import resumed_step
    from moetrain.checkpoint.stored import stored_config
    from moetrain.checkpoint.use import resolve

    path = resumed_step(config) or resolve(source, "init.from")
    return inherit(config, stored_config(path), overrides, source)


@contextmanager
def running(config: Config) -> Iterator[Trainer]:
    """A trainer on the ranks of this launch, which all call this; both are given back at the end, or on an error.

    Raises ValueError for what the user must change, most of it before ranks start.
    """
    layout = validate(config, world_size())
    check_plugins(config)
    rehearse(config)
    set_determinism(config)

    from moetrain.checkpoint.same import changes, check_resumed, resumed_step
    from moetrain.comm.start import start_distributed, stop_distributed
    from moetrain.trainer import Trainer

    if path := resumed_step(config):
        check_resumed(config, path)
    device = start_distributed()
    try:
        trainer = Trainer(config, layout, device)
        if trainer.beginning.path:
            trainer.beginning.notes += changes(config, trainer.beginning.path)
        try:
            yield trainer
        finally:
            trainer.close()
    finally:
        stop_distributed()


def rehearse(config: Config) -> None:
    """Build every plugin once without storage, so that a value one of them refuses is refused before ranks start."""
    import torch

    from moetrain.model.build import build_model
    from moetrain.observe.trackers.build import build_trackers
    from moetrain.optim.build import build_optimizer
    from moetrain.parallel.ep import make_capacity
    from moetrain.parallel.placement import make_placement

    with torch.device("meta"):
        build_model(config, "cuda" if torch.cuda.device_count() else "cpu")
    make_capacity(config, max(config.model.moe.n_experts, 1))
    make_placement(config)
    build_optimizer(config.optim, [("weight", torch.nn.Parameter(torch.zeros(1, 1)))])
    build_trackers(config.tracker)


def set_determinism(config: Config) -> None:
    """Seed the global generators, which nothing of ours draws from, and forbid nondeterministic kernels if asked."""
    import numpy as np
    import torch

    random.seed(config.run.seed)
    np.random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
