"""Any number of ranks without a second process: one rank's meshes and its part of a model, built on paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetrain.config.schema import Config
from moetrain.mesh.build import Meshes, build_meshes
from moetrain.mesh.layout import Layout
from moetrain.model.build import build_model
from moetrain.model.decoder import Decoder
from moetrain.parallel.apply import divide


@contextmanager
def paper_ranks(rank: int, world: int) -> Iterator[None]:
    """Be `rank` of `world` ranks whose collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def paper_model(config: Config, layout: Layout) -> tuple[Decoder, Meshes]:
    """The calling rank's part of the model, without storage, and its meshes. Inside `paper_ranks`."""
    meshes = build_meshes(layout, "cpu")
    with torch.device("meta"):
        model = build_model(config, "cpu")
    divide(model, config, meshes)
    return model, meshes
