"""Tokens per second, model FLOP utilisation, and peak memory of a step."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Dense bf16 tensor-core peaks in FLOP/s, without sparsity: the vendors' data sheets (NVIDIA quotes most with 2:4
# sparsity, so those are halved here). A row matches when every word occurs in the device's name; the first match
# counts, so variants stand before the plain name.
PEAK_BF16: tuple[tuple[tuple[str, ...], float], ...] = (
    (("GB200",), 2500e12),  # per GPU of the superchip, GB200 NVL72 data sheet: 360 PF sparse / 72 / 2
    (("B200",), 2250e12),  # HGX B200 data sheet: 36 PF sparse / 8 / 2
    (("GH200",), 989.4e12),  # GH200 data sheet
    (("H200", "NVL"), 835.5e12),  # H200 data sheet, NVL column
    (("H200",), 989.4e12),  # H200 data sheet, SXM column
    (("H100", "NVL"), 835.5e12),  # H100 data sheet, NVL column
    (("H100", "PCIe"), 756e12),  # H100 data sheet, PCIe column
    (("H100",), 989.4e12),  # H100 data sheet, SXM column
    (("H800", "PCIe"), 756e12),  # as H100 PCIe; only links and fp64 differ
    (("H800",), 989.4e12),  # as H100 SXM
    (("H20",), 148e12),  # H20 data sheet
    (("A100",), 312e12),  # A100 data sheet
    (("A800",), 312e12),  # as A100
    (("L40S",), 362.05e12),  # L40S data sheet
    (("MI300X",), 1307.4e12),  # AMD Instinct MI300X data sheet
)


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 peak of the device torch names so, in FLOP/s; None when the table does not know it.

    Words are compared whole, so "H20" does not match "H200" and "B200" does not match "GB200". A MIG slice has only
    part of its GPU's peak and counts as unknown.
    """
    words = device_name.replace("-", " ").split()
    if "MIG" in words:
        return None
    for wanted, peak in PEAK_BF16:
        if all(word in words for word in wanted):
            return peak
    return None


class Throughput:
    """Times optimizer steps on rank 0's clock, leaving out evaluation and checkpoints.

    flops_per_token: of the positions that a token looks at on average: floating-point operations, forward and backward,
    of one token through the parameters active for it; None gives no MFU.
    The caller has read a value of the step from the device (its loss, say) before `step`, so the clock sees a
    finished step and no synchronisation is added here.
    """

    def __init__(
        self,
        world_size: int,
        device: torch.device,
        flops_per_token: Callable[[float], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._world_size = world_size
        self._device = device
        self._flops_per_token = flops_per_token
        self._peak = peak_bf16_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._clock = clock
        self._excluded = 0.0
        self._start = clock()

    def start(self) -> None:
        """The first step begins now."""
        self._start, self._excluded = self._clock(), 0.0

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time spent inside (evaluation, a checkpoint) does not count as training."""
        begin = self._clock()
        try:
            yield
        finally:
            self._excluded += self._clock() - begin

    def step(self, tokens: int, attended: float) -> dict[str, float | None]:
        """End a step that trained on `tokens` tokens (all ranks together), each of which looked at `attended` positions
        on average, and begin the next.

        Returns tokens_per_s, tokens_per_s_per_gpu (per rank on a CPU), mfu (None without a known peak), peak_memory_gb.
        """
        now = self._clock()
        seconds = now - self._start - self._excluded
        self._start, self._excluded = now, 0.0
        per_s = tokens / seconds if seconds > 0 else 0.0
        per_gpu = per_s / self._world_size
        mfu = None
        if self._peak is not None and self._flops_per_token is not None:
            mfu = per_gpu * self._flops_per_token(attended) / self._peak
        return {
            "tokens_per_s": per_s,
            "tokens_per_s_per_gpu": per_gpu,
            "mfu": mfu,
            "peak_memory_gb": self._peak_memory() / 1e9,
        }

    def _peak_memory(self) -> int:
        """Bytes: allocated by torch on this rank's GPU, or resident for this process; the most since it started."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
