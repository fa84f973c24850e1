"""The launcher's own lookup of compiled kernels."""

import pytest
import torch
from moetrain_kernels import compile_check, configs
from moetrain_kernels.launch import Launcher

pytestmark = pytest.mark.unit


class Kernel:
    """Stands for a kernel and for what it compiles to."""

    def __getitem__(self, grid):
        return lambda *args, **constants: self


class OnGPU:
    """What the launcher asks of a tensor on a GPU."""

    is_cuda, device, dtype = True, "cuda:0", torch.float32

    def data_ptr(self):
        return 16


def test_a_size_beyond_32_bits_is_compiled_anew(monkeypatch):
    monkeypatch.setattr(torch, "Tensor", OnGPU)
    launch = Launcher(Kernel())
    kernels = []
    for size in (100, 2**31 - 1, 2**31, 2**40):
        launch((1, 1, 1), (OnGPU(), size), {"BLOCK": 128})
        kernels.append(len(launch.variants))
    assert kernels == [1, 1, 2, 2]


def test_a_length_that_triton_compiles_in_selects_the_kernel(monkeypatch):
    """Triton takes 1 for a constant, and a multiple of 16 for a licence to load wide."""
    monkeypatch.setattr(torch, "Tensor", OnGPU)
    launch = Launcher(Kernel())
    kernels = []
    for row in (3072, 3080, 1, 2, 48):
        launch((1, 1, 1), (OnGPU(), row), {"BLOCK": 128})
        kernels.append(len(launch.variants))
    assert kernels == [1, 2, 3, 3, 3]


def test_compiling_for_a_device_starts_none(monkeypatch):
    """The benchmark's processes fill the cache after a fork, in which CUDA cannot be started again."""

    def started(*args):
        raise AssertionError("CUDA")

    monkeypatch.setattr(torch.cuda, "stream", started)
    monkeypatch.setattr(Launcher, "__call__", lambda *args, **options: None)
    monkeypatch.setattr(configs, "device_traits", lambda device: (132, 90))
    compile_check.compile_layer(torch.bfloat16, 1024)


@pytest.mark.parametrize("arch", [80, 90])
def test_constants_come_in_the_order_of_the_kernels_signature(arch, monkeypatch):
    """A compiled kernel is launched with their values by position."""
    launches = []

    def record(launcher, grid, args, constants, **options):
        launches.append((launcher.kernel.fn.__name__, launcher.kernel.arg_names[len(args) :], list(constants)))

    monkeypatch.setattr(Launcher, "__call__", record)
    monkeypatch.setattr(configs, "device_traits", lambda device: (132, arch))
    monkeypatch.setattr(compile_check.pieces, "check", lambda *args: None)
    for num_tokens in (1024, 16):
        compile_check.compile_layer(torch.bfloat16, num_tokens)
    compile_check.compile_pieces(torch.bfloat16, 1024)
    compile_check.compile_model()
    assert [launch for launch in launches if launch[1] != launch[2]] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", [80, 90])
def test_another_number_of_rows_compiles_nothing_anew(arch, dtype, monkeypatch):
    """Rows that arrive from other ranks differ in number with every step; a compilation takes seconds."""
    launches = []

    def record(launcher, grid, args, constants, **options):
        launches.append((launcher.kernel.fn.__name__, constants, options))

    monkeypatch.setattr(Launcher, "__call__", record)
    monkeypatch.setattr(configs, "device_traits", lambda device: (132, arch))
    monkeypatch.setattr(compile_check.pieces, "check", lambda *args: None)
    found = []
    for num_tokens in (400, 500):
        compile_check.compile_layer(dtype, num_tokens)
        compile_check.compile_pieces(dtype, num_tokens)
        found.append(launches[:])
        launches.clear()
    assert found[0] == found[1]
    assert len(found[0]) > 12
