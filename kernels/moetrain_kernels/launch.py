"""How a kernel is launched: block sizes, the number of persistent programs, and TMA descriptors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tiles:
    """Blocks of one kernel. `bm` x `bn` is the output tile (for the up kernel bn counts gate columns, so the
    accumulator is 2 bn wide), `bk` the reduction step, `split` the epilogue's column parts, `sms` the device's
    multiprocessors, `per_sm` the programs on each."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    per_sm: int = 1
    split: int = 1
    group: int = 16
    sms: int = 1
    tma: bool = False
    precision: str = "tf32"


@dataclass(frozen=True)
class Ring:
    """Blocks of a warp-specialised Hopper kernel: output tiles of 128 x `bn` (for the up kernel bn counts gate columns)
    and reduction steps of `bk`, in a ring of `stages`; each consumer stores `cols` columns at a time through `bufs`
    staging buffers."""

    bn: int = 256
    stages: int = 4
    cols: int = 64
    bufs: int = 2
    group: int = 8
    bk: int = 64
    sms: int = 1

    @property
    def bm(self) -> int:
        return 128


class Launcher:
    """Launches one kernel; finds the compiled variant by a key of its own.

    Triton's own lookup costs the host tens of microseconds, twelve times a step: more than a small layer's kernels
    take. The key here is the constants and, per argument, what Triton specialises on: a tensor's dtype and 16-byte
    alignment; an integer's width, and whether it is 1 or a multiple of 16. Integers that follow the routing should be
    declared do_not_specialize: they would compile kernels of their own.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self.variants: dict[tuple, object] = {}

    def __call__(self, grid: tuple[int, ...], args: tuple, constants: dict, **options: int) -> None:
        """`args` come before the constants in the kernel's signature, in order; grid is (x, y, z)."""
        tensor = next(a for a in args if isinstance(a, torch.Tensor))
        if not tensor.is_cuda:  # interpreted, or compiled only
            self.kernel[grid](*args, **constants, **options)
            return
        values = tuple(constants.values())
        key = (tensor.device, values, tuple(options.values()), *map(_trait, args))
        variant = self.variants.get(key)
        if variant is None:
            self.variants[key] = self.kernel[grid](*args, **constants, **options)
        else:
            variant[grid](*args, *values)


def _trait(arg: object) -> object:
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return int, arg.bit_length() > 31, arg % 16 == 0, arg == 1  # 32 bits, or 64
    base = getattr(arg, "base", None)
    return type(arg) if base is None else base.dtype


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU (TRITON_INTERPRET=1, set before triton was imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def device_traits(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, compute capability such as 90) of a device; the interpreter counts as two multiprocessors."""
    if device.type != "cuda":
        return 2, 0
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_properties(device).multi_processor_count, 10 * major + minor


def programs(tiles: Tiles | Ring) -> int:
    """Persistent programs, of which some may find no tile.

    Kernels are compiled for this number. If it followed the rows, every routing of a small layer would have kernels
    of its own, at seconds each.
    """
    return tiles.sms * getattr(tiles, "per_sm", 1)


def launch_ring(launch: Launcher, ring: Ring, args: tuple, constants: dict, registers: tuple[int, int]) -> None:
    """Launch a warp-specialised kernel; `registers` a thread of (producer, consumers).

    `constants` come before the ring's own in the kernel's signature. Compiled for 168 registers, which three groups of
    128 threads have; the partitions then share them anew.
    """
    p = programs(ring)
    blocks = {"BN": ring.bn, "BK": ring.bk, "GROUP": ring.group, "P": p, "STAGES": ring.stages}
    share = {"PRODUCER_REGS": registers[0], "CONSUMER_REGS": registers[1]}
    launch((p, 1, 1), args, {**constants, **blocks, **share}, num_warps=4, maxnreg=168)


def block_desc(tensor: torch.Tensor, block: tuple[int, ...], tma: bool) -> TensorDescriptor | torch.Tensor:
    """A TMA descriptor of a contiguous tensor, or the tensor itself where TMA is not used.

    The constructor's checks are skipped: fits_tma made them once for the layer, and sixteen of them a step are a
    tenth of what a small layer may spend on the host.
    """
    if not tma:
        return tensor
    desc = object.__new__(TensorDescriptor)
    desc.__dict__.update(
        base=tensor,
        shape=tensor.shape,
        strides=tensor.stride(),
        block_shape=list(block),
        padding="zero",
        round_f32_to_tf32=False,
    )
    return desc


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b. Triton's own function of this name costs 6 us a call on the host, next to 25 us a launch."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Smallest power of two that is at least n (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


def fits_tma(*tensors: torch.Tensor) -> bool:
    """TMA needs a 16-byte aligned base and row pitch."""
    return all(t.data_ptr() % 16 == 0 and t.shape[-1] * t.element_size() % 16 == 0 for t in tensors)


def available() -> tuple[bool, str]:
    """(can these kernels run here, why)."""
    if interpreting():
        return True, "Triton interpreter on the CPU"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return False, f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return True, f"Triton {triton.__version__} on {torch.cuda.get_device_name()}"
