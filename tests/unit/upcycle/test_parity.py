"""The parity table's claims on a small random model, and that a wrong claim would show."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from moetrain.data.batch import Batch
from moetrain.testing.dense import random_dense
from moetrain.testing.parity import BAR, CASES, RAW, Case, measure, row

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def dense():
    return random_dense(dtype=torch.float32, d_ff=64)


@pytest.fixture(scope="module")
def batches():
    token_BS = torch.randint(0, 264, (4, 33), generator=torch.Generator().manual_seed(1))
    shape = (4, 32)
    position_BS = torch.arange(32).expand(shape)
    mask_BS, document_BS = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int32)
    return [Batch(token_BS[:, :-1], token_BS[:, 1:], mask_BS, position_BS, document_BS, ["a"] * 4)]


@pytest.mark.parametrize("case", [c for c in CASES if c.exact and c.order == "post"], ids=lambda c: c.label)
def test_claims_hold(case, dense, batches):
    line, holds = row(case, [dense], batches, measure(dense, batches).loss)
    assert holds, line


def test_a_wrong_claim_fails(dense, batches):
    wrong = replace(Case("drop", 8, 2, options={"ratio": "0.1"}), exact=True)
    line, holds = row(wrong, [dense], batches, measure(dense, batches).loss)
    assert not holds
    assert "FAILED" in line
    assert abs(float(line.split("|")[6])) > 100 * BAR


def test_deviation_of_plain_probabilities_is_the_expected_one(dense, batches):
    line, _ = row(Case("copy", 8, 2, options={**RAW, "router_std": "0.2"}), [dense], batches, 0.0)
    expected, found = map(float, re.search(r"x (\S+) expected, (\S+) found", line).groups())
    assert found == pytest.approx(expected, rel=0.1)  # 3 layers' routers of 8 rows: the directions are few
    assert found > 1.5
