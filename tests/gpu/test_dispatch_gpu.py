"""Dispatchers between two GPUs: equal to one process, and no waiting host where none is promised."""

import pytest
import torch

from moetrain.testing import run_ranks
from moetrain.testing.two_gpus import LAYERS, TRANSPORTS, host_waits, stacked_layers, worst_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("name", TRANSPORTS)
def test_equals_one_process(name):
    assert max(run_ranks(worst_error, 2, name, backend="nccl")) < 1e-10


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices")
@pytest.mark.parametrize("name", [name for name in TRANSPORTS if "nodes of 2" in name])
def test_two_nodes_of_two_equal_one_process(name):
    assert max(run_ranks(worst_error, 4, name, backend="nccl")) < 1e-10


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("collective 4", 2), ("allgather 2", 0), ("copy_engine 3", 0), ("two_level 3, nodes of 2", 2)],
)
def test_host_synchronisations(name, allowed):
    for waits in run_ranks(host_waits, 2, name, backend="nccl"):
        assert len(waits) <= allowed, waits


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_layers_in_shared_memory_repeat_to_the_bit(chunks):
    """bf16 by the kernels of large layers, on two streams; of the bar, a layer may take what its roundings do."""
    for error, same in run_ranks(stacked_layers, 4 if torch.cuda.device_count() >= 4 else 2, chunks, backend="nccl"):
        assert same
        assert error < LAYERS * 2**-8
