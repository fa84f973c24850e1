import numpy as np
import pytest

from moetrain.config.data import SourceConfig
from moetrain.data.documents import DocumentReader
from moetrain.data.readers import open_source
from moetrain.data.stream import StreamRows, first_rows
from moetrain.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.unit
S = 32
EOS = ByteTokenizer.eos_id


def _everything(name):
    return True


def _open(path, seed=0, keep=_everything):
    config = SourceConfig(kind="jsonl", path=path, streaming=True)
    source = open_source("data.sources.x", config)
    reader = DocumentReader("data.sources.x", config, ByteTokenizer())
    return StreamRows("x", reader, source, keep, S, seed), reader, source


def _all(rows):
    return np.ones(rows, dtype=bool)


@pytest.fixture
def two_files(write_jsonl, texts, tmp_path):
    for i in range(3):
        write_jsonl([{"text": t} for t in texts[i * 5 : i * 5 + 5]], f"data/{i}.jsonl")
    return str(tmp_path / "data")


def test_rows_are_the_concatenated_documents_by_hand(write_jsonl, texts):
    stream, *_ = _open(write_jsonl([{"text": t} for t in texts]))
    tokens, begins = [], []
    for text in texts + texts:  # two epochs
        begins.append(len(tokens))
        tokens += [*text.encode(), EOS]
    n = (len(tokens) - 1) // S
    for r, row in enumerate(stream.read(0, _all(n))):
        assert row.tokens_L.tolist() == tokens[r * S : r * S + S + 1]
        assert row.begins.tolist() == [b - r * S for b in begins if r * S <= b <= r * S + S]


def test_each_epoch_reads_every_file_once_in_an_order_of_its_own(two_files, texts):
    stream, *_ = _open(two_files)
    one_epoch = sum(len(t.encode()) + 1 for t in texts[:15])
    tokens = np.concatenate([r.tokens_L[:-1] for r in stream.read(0, _all(6 * one_epoch // S + 1))])
    marks = [texts[i * 5].encode() for i in range(3)]  # each file's first document
    orders = []
    for epoch in range(6):
        text = bytes(t if t < 256 else 0 for t in tokens[epoch * one_epoch : (epoch + 1) * one_epoch])
        places = [text.index(mark + b"\0") for mark in marks]
        orders.append(tuple(np.argsort(places)))
        assert sorted(text.split(b"\0")[:-1]) == sorted(t.encode() for t in texts[:15])
    assert len(set(orders)) > 1


def test_resume_at_any_row_gives_the_same_rows(two_files):
    uninterrupted, *_ = _open(two_files)
    states, rows = [], []
    for i in range(60):  # over two epochs
        states.append(uninterrupted.state_dict())
        rows += uninterrupted.read(i, _all(1))
    assert states[-1]["epoch"] >= 1
    for at in range(0, 60, 3):
        resumed, *_ = _open(two_files)
        resumed.load_state_dict(states[at])
        assert resumed.state_dict() == states[at]
        for row, expected in zip(resumed.read(at, _all(min(5, 60 - at))), rows[at:]):
            assert row.sample_id == expected.sample_id
            assert row.tokens_L.tolist() == expected.tokens_L.tolist()
            assert row.begins.tolist() == expected.begins.tolist()


def test_unwanted_rows_are_passed_over_not_skipped(two_files):
    whole, part = _open(two_files)[0], _open(two_files)[0]
    rows = whole.read(0, _all(10))
    wanted = np.arange(10) % 3 == 1
    read = part.read(0, wanted)
    assert [r is not None for r in read] == wanted.tolist()
    assert [r.sample_id for r in read if r] == [r.sample_id for r, w in zip(rows, wanted) if w]
    assert part.state_dict() == whole.state_dict()


def test_held_out_documents_are_never_streamed(two_files, texts):
    def even(name):
        return int(name.rsplit(":")[-1]) % 2 == 0

    stream, reader, source = _open(two_files, keep=even)
    tokens = np.concatenate([r.tokens_L[:-1] for r in stream.read(0, _all(40))])
    seen = bytes(t if t < 256 else 0 for t in tokens).split(b"\0")[1:-1]
    assert set(seen) == {t.encode() for i, t in enumerate(texts[:15]) if i % 5 % 2 == 0}
    held = first_rows("x", reader, source.shards, lambda name: not even(name), S, limit=1000)
    text = np.concatenate([r.tokens_L[1:] for r in held])  # the last, short row included
    expected = [t for i, t in enumerate(texts[:15]) if i % 5 % 2 == 1]
    assert text.tolist() == [b for t in expected for b in (*t.encode(), EOS)][1:]
    assert len(first_rows("x", reader, source.shards, lambda name: not even(name), S, limit=2)) == 2


def test_an_empty_stream_is_named_rather_than_read_for_ever(write_jsonl):
    stream, *_ = _open(write_jsonl([{"text": ""}]))
    with pytest.raises(ValueError, match=r"data\.sources\.x is empty"):
        stream.read(0, _all(1))
