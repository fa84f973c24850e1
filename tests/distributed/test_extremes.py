"""Fifty steps on extreme inputs: no hang, and no expert without gradient or optimizer state.

Every layout: `python -m moetrain.testing.extremes`. Here two that between them have every kind of exchange.
"""

import pytest

from moetrain.testing import run_ranks
from moetrain.testing.extremes import survive
from moetrain.testing.layouts import Case

pytestmark = pytest.mark.distributed
CASES = [
    Case(4, {"tp": 2, "ep": 2, "etp": 2}, ("parallel.recompute=full",)),
    Case(4, {"pp": 2, "cp": 2, "ep": 2}, ("parallel.cp_method=ring", "parallel.schedule=interleaved")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_hang_and_no_expert_left_out(case, documents, tmp_path):
    ranks = run_ranks(survive, case.world, case, documents, str(tmp_path), 50, timeout_s=300)
    assert all(losses == ranks[0] for losses in ranks)
    assert set(ranks[0]) == {"one expert", "silent ranks", "one token"}
