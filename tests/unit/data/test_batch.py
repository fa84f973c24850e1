import numpy as np
import pytest

from moetrain.data.batch import PADDING, Row, make_batch

pytestmark = pytest.mark.unit

# Documents [10 11 12 E] [20 E] [30 31 ...: a row of S=8 starts in the middle of the first.
TOKENS = np.array([11, 12, 99, 20, 99, 30, 31, 32, 33])
BEGINS = np.array([3, 5])


def test_stop_by_hand():
    batch = make_batch([Row("s:0:7", TOKENS, BEGINS)], 8, "stop")
    assert batch.token_BS.tolist() == [[11, 12, 99, 20, 99, 30, 31, 32]]
    assert batch.target_BS.tolist() == [[12, 99, 20, 99, 30, 31, 32, 33]]
    assert batch.loss_mask_BS.int().tolist() == [[1, 1, 0, 1, 0, 1, 1, 1]]
    assert batch.position_BS.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.document_BS.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch.sample_ids == ["s:0:7"]


def test_cross_by_hand():
    batch = make_batch([Row("", TOKENS, BEGINS)], 8, "cross")
    assert batch.loss_mask_BS.all()
    assert batch.position_BS.tolist() == [list(range(8))]
    assert batch.document_BS.tolist() == [[0] * 8]


@pytest.mark.parametrize(
    ("begins", "masked", "documents"), [([0], [], [0, 0, 0]), ([3], [2], [0, 0, 0]), ([2], [1], [0, 0, 1])]
)
def test_a_document_that_begins_at_an_edge_of_the_row(begins, masked, documents):
    batch = make_batch([Row("", np.array([1, 2, 3, 4]), np.array(begins))], 3, "stop")
    assert np.flatnonzero(~batch.loss_mask_BS[0].numpy()).tolist() == masked
    assert batch.document_BS.tolist() == [documents]


@pytest.mark.parametrize(("documents", "kept"), [("stop", [0, 1, 0, 1]), ("cross", [0, 1, 1, 1])])
def test_the_mask_column_belongs_to_targets(documents, kept):
    row = Row("", np.array([1, 2, 3, 4, 5]), np.array([3]), np.array([1, 0, 1, 1, 1], dtype=np.uint8))
    assert make_batch([row], 4, documents).loss_mask_BS.int().tolist() == [kept]


def test_padding_rows_and_short_rows():
    short = Row("v:0:9", np.array([1, 2, 3]), np.array([1]))
    batch = make_batch([short, PADDING], 4, "stop")
    assert batch.document_BS.tolist() == [[0, 1, -1, -1], [-1] * 4]
    assert batch.loss_mask_BS.int().tolist() == [[0, 1, 0, 0], [0] * 4]
    assert batch.sample_ids == ["v:0:9", ""]
    assert str(batch.document_BS.dtype) == "torch.int32"
    assert batch.to("cpu").sample_ids == batch.sample_ids
