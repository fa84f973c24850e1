"""The launcher's own lookup of compiled kernels."""

import pytest
import torch
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
