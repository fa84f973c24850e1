"""Extreme inputs: no hang, and no expert without gradient or optimizer state.

All layouts, fifty steps: `python -m moetrain.testing.extremes`. Here two with every kind of exchange between them.
"""

import pytest

from moetrain.testing import run_ranks
from moetrain.testing.extremes import survive
from moetrain.testing.layouts import Case

pytestmark = pytest.mark.distributed
CASES = [
    (Case(2, {"tp": 2, "ep": 2}, ("parallel.recompute=full",)), 6),
    (Case(4, {"pp": 2, "cp": 2, "etp": 2}, ("parallel.cp_method=ring", "parallel.schedule=interleaved")), 3),
]


@pytest.mark.parametrize(("case", "steps"), CASES, ids=lambda value: getattr(value, "name", None))
def test_no_hang_and_no_expert_left_out(case, steps, documents, tmp_path):
    ranks = run_ranks(survive, case.world, case, documents, str(tmp_path), steps, timeout_s=300)
    assert all(losses == ranks[0] for losses in ranks)
    assert set(ranks[0]) == {"one expert", "silent ranks", "one token"}
