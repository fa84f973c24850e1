"""A MoE layer's static parts in a CUDA graph: replays with other tokens and routings equal eager passes to the bit."""

import pytest
import torch

from moetrain.testing import run_ranks
from moetrain.testing.graphs import ONE_GPU, TWO_GPUS, replayed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", ONE_GPU)
def test_replays_equal_eager_passes(name):
    assert run_ranks(replayed, 1, name, backend="nccl") == [0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", TWO_GPUS)
def test_replays_equal_eager_passes_between_ranks(name):
    assert run_ranks(replayed, 2, name, backend="nccl") == [0, 0]
