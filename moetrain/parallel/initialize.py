"""Initial values that do not depend on the layout.

Each parameter is drawn from a generator seeded by (seed, its name), each expert by (seed, name, expert): a rank draws
what it holds a part of and keeps its part, so every layout starts from the same model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def materialise(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give meta parameters storage on `device` in `dtype`; buffers keep their values."""
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not lost, f"buffers without values: {lost}"

    def move(t: Tensor) -> Tensor:
        if t.is_meta:
            return torch.empty_like(t, device=device, dtype=dtype)
        return t.to(device)

    model._apply(move)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, std: float) -> None:
    """Weights ~ N(0, std^2), norms 1, biases 0, each from its own generator. Values are drawn in fp32 on the CPU, by as
    many threads as torch has: one draws 10^8 a second, and a rank may hold 10^10."""
    draws: list[Callable[[], None]] = []
    for name, parameter in model.named_parameters():
        local, offset = local_part(parameter)
        if ".experts." in f".{name}":
            for i in range(local.shape[0]):
                expert, shape = f"{name}.{offset[0] + i}", tuple(parameter.shape[1:])
                draws.append(partial(_fill, local[i], expert, shape, offset[1:], seed=seed, std=std))
        else:
            draws.append(partial(_fill, local, name, tuple(parameter.shape), offset, seed=seed, std=std))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for done in [pool.submit(draw) for draw in draws]:
            done.result()


def _fill(local: Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...], *, seed: int, std: float) -> None:
    with torch.no_grad():  # which is each thread's own
        local.copy_(_cut(_draw(name, shape, seed, std), tuple(local.shape), offset))


def local_part(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's storage of `parameter` and where it begins in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(offset)


def _cut(whole: Tensor, shape: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
    return whole[tuple(slice(o, o + s) for o, s in zip(offset, shape))]


def _draw(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    leaf = name.split(".")[-1]
    if "norm" in name:
        return torch.ones(shape)
    if leaf == "bias" or leaf.endswith("_bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
