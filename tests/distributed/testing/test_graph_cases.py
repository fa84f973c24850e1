"""The cases that GPU tests capture in CUDA graphs, run eagerly without one."""

import pytest

from moetrain.testing import run_ranks
from moetrain.testing.graphs import ONE_GPU, TWO_GPUS, case

pytestmark = pytest.mark.distributed


def outputs(name):
    run, inputs = case(name, 2, "cpu")
    first, second = (run(*tensors) for tensors in inputs)
    return [[bool(t.isfinite().all()), bool((a != t).any())] for a, t in zip(first, second, strict=True)]


@pytest.mark.parametrize(("name", "ranks"), [*((n, 1) for n in ONE_GPU), *((n, 2) for n in TWO_GPUS)])
def test_cases_differ_in_every_output(name, ranks):
    for rank in run_ranks(outputs, ranks, name):
        assert all(finite and differs for finite, differs in rank)
