"""Sizes of a global batch, counted by hand over two ranks."""

import numpy as np
import pytest
import torch.distributed as dist

from moetrain.data.batch import PADDING, Row, global_totals, make_batch
from moetrain.testing import run_ranks

pytestmark = pytest.mark.distributed
TOKENS = np.arange(10, 19)  # a row of eight, whose documents have 3, 2, and 3 tokens


def totals(documents):
    rows = [Row("a", TOKENS, np.array([3, 5])), Row("b", TOKENS[:4], np.array([0]))][: 2 - dist.get_rank()]
    batches = [make_batch([row, PADDING], 8, documents) for row in rows]
    found = global_totals(batches, 2, dist.group.WORLD)
    return found.loss_tokens.item(), found.tokens.item(), found.attended.item()


@pytest.mark.parametrize(
    ("documents", "loss", "attended"), [("stop", 2 * 6 + 3, 2 * 15 + 6), ("cross", 19, 2 * 36 + 6)]
)
def test_documents_are_looked_at_up_to_oneself(documents, loss, attended):
    """1 + 2 + 3, 1 + 2, 1 + 2 + 3 positions, or 1 + ... + 8 where documents are one; a row of three tokens has 6."""
    assert run_ranks(totals, 2, documents) == [(loss, 19, attended)] * 2
