"""Compiled parts of a block change nothing: against the same steps of one process without the compiler, in fp64."""

import pytest
import torch

from moetrain.parallel import compile as parallel_compile
from moetrain.testing import run_ranks
from moetrain.testing.layouts import Case
from moetrain.testing.small import write_documents
from moetrain.testing.trajectory import compare, record

pytestmark = pytest.mark.distributed
STEPS, BAR = 3, 1e-9
CASES = [
    Case(1),
    Case(2, {"cp": 2, "ep": 2}, ("parallel.recompute=selective",)),
    Case(2, {"pp": 2}, ("parallel.recompute=full",)),
]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"), longest=12)


@pytest.fixture(scope="module")
def single(documents, tmp_path_factory):
    options = Case(1).overrides(documents, tmp_path_factory.mktemp("single"), "fp64")
    return run_ranks(record, 1, options, STEPS)[0][0]


def record_compiled(options, steps):
    """Trace with autograd and all, but without the C++ compiler; count what was traced."""
    graphs = []
    parallel_compile.BACKEND = torch._dynamo.lookup_backend("aot_eager")
    plain = parallel_compile.BACKEND

    def backend(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return plain(graph, inputs)

    parallel_compile.BACKEND = backend
    return record(options, steps)[0], len(graphs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiling_changes_nothing(case, documents, single, tmp_path):
    options = [*case.overrides(documents, tmp_path, "fp64"), "parallel.compile=true"]
    run, graphs = run_ranks(record_compiled, case.world, options, STEPS)[0]
    assert graphs > 1, "nothing was compiled"
    difference = compare(run, single)
    assert difference.worst < BAR, difference
