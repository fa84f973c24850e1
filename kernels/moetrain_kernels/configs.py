"""Which block sizes each kernel uses: a fixed table per device and dtype, no tuning at run time.

The four kernels that walk row tiles share one `bm`, because they share one tile table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from .launch import Ring, Tiles, device_traits, fits_tma


@dataclass(frozen=True)
class Config:
    """Blocks of the six GEMM-like kernels of one expert layer."""

    up: Tiles | Ring
    down: Tiles | Ring
    down_grad: Tiles | Ring
    dx: Tiles | Ring
    dw_down: Tiles | Ring
    dw_up: Tiles | Ring

    @property
    def block_m(self) -> int:
        return self.up.bm

    def on(self, sms: int, tma: bool, precision: str) -> Config:
        """The same blocks bound to a device."""

        def bind(tiles: Tiles | Ring) -> Tiles | Ring:
            if isinstance(tiles, Ring):
                return replace(tiles, sms=sms)
            return replace(tiles, sms=sms, tma=tma, precision=precision)

        return Config(**{name: bind(tiles) for name, tiles in vars(self).items()})


# Hopper, 16-bit, D a multiple of 64, at least about 200 rows per expert: warp-specialised kernels.
RING = Config(up=Ring(bn=128), down=Ring(), down_grad=Ring(), dx=Ring(), dw_down=Ring(group=4), dw_up=Ring(group=4))
# The same with few rows per expert: half the row tile wastes fewer rows, the weights are what is read.
HOPPER_FEW_ROWS = Config(
    up=Tiles(64, 128, 64, warps=8, stages=4),
    down=Tiles(64, 256, 64, warps=4, stages=4, split=4),
    down_grad=Tiles(64, 256, 64, warps=8, stages=4, split=4),
    dx=Tiles(64, 256, 64, warps=4, stages=4, split=4),
    dw_down=Ring(group=4),
    dw_up=Ring(group=4),
)
# Hopper, 16-bit, any other D. One program per multiprocessor owns nearly all its registers.
HOPPER = Config(
    up=Tiles(128, 128, 64, warps=8, stages=3),
    down=Tiles(128, 256, 64, warps=8, stages=3, split=2, group=8),
    down_grad=Tiles(128, 256, 64, warps=8, stages=3, split=2, group=8),
    dx=Tiles(128, 256, 64, warps=8, stages=3, split=2),
    dw_down=Tiles(128, 256, 64, warps=8, stages=5, group=4),
    dw_up=Tiles(128, 256, 64, warps=8, stages=5, group=4),
)
# Anything else that Triton runs on: pointer loads, and tiles that also fit fp32 and smaller shared memories.
PORTABLE = Config(
    up=Tiles(64, 32, 32, warps=4, stages=3, per_sm=3),
    down=Tiles(64, 64, 32, warps=4, stages=3, per_sm=3),
    down_grad=Tiles(64, 64, 32, warps=4, stages=3, per_sm=3),
    dx=Tiles(64, 64, 32, warps=4, stages=3, per_sm=3),
    dw_down=Tiles(64, 64, 32, warps=4, stages=3, per_sm=3),
    dw_up=Tiles(64, 64, 32, warps=4, stages=3, per_sm=3),
)
INTERPRETED = Config(*[Tiles(16, 16, 16, warps=4, stages=1, split=s, group=2) for s in (1, 1, 1, 1, 1, 1)])


@cache
def leaving(tiles: Tiles | Ring, spare: int) -> Tiles | Ring:
    """The same blocks on fewer multiprocessors. A ring kernel shares none with any other program."""
    return replace(tiles, sms=tiles.sms - spare) if isinstance(tiles, Ring) else tiles


def choose(x_TD: torch.Tensor, w_gate_up_E2FD: torch.Tensor, w_down_EDF: torch.Tensor, rows: int) -> Config:
    """The table's entry for these tensors on this device; `rows` is the bound on active slots."""
    sms, capability = device_traits(x_TD.device)
    if capability == 0:
        return _bound(INTERPRETED, sms, False, "ieee")
    precision = "ieee" if x_TD.dtype == torch.float32 else "tf32"
    if capability == 90 and x_TD.element_size() == 2 and fits_tma(x_TD, w_gate_up_E2FD, w_down_EDF):
        few = rows < 200 * w_down_EDF.shape[0]
        table = HOPPER if x_TD.shape[1] % 64 else HOPPER_FEW_ROWS if few else RING
        return _bound(table, sms, True, precision)
    return _bound(PORTABLE, sms, False, precision)


@cache
def _bound(table: Config, sms: int, tma: bool, precision: str) -> Config:
    return table.on(sms, tma, precision)
