import numpy as np
import pytest

from moetrain.data.store import StoreWriter, TokenStore
from moetrain.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.unit


def _documents(lengths, high=257):
    rng = np.random.default_rng(0)
    return [rng.integers(0, high, n) for n in lengths]


def _write(path, documents, masks=None, shard_tokens=10, tokenizer=None):
    writer = StoreWriter(path, tokenizer or ByteTokenizer(), masks is not None, shard_tokens)
    for i, ids in enumerate(documents):
        writer.add(ids, masks[i] if masks else None)
    return writer.close()


def test_any_window_across_shards_reads_back(tmp_path):
    documents = _documents([3, 9, 1, 25, 4, 4, 2, 1])
    masks = [np.arange(len(d)) % 2 for d in documents]
    meta = _write(tmp_path / "s", documents, masks)
    assert len(meta["shards"]) >= 3
    store = TokenStore(tmp_path / "s", "x")
    tokens, mask = np.concatenate(documents), np.concatenate(masks)
    begins = np.concatenate([[0], np.cumsum([len(d) for d in documents])[:-1]])
    assert store.tokens == len(tokens)
    for start in range(len(tokens)):
        for stop in range(start + 1, len(tokens) + 1):
            read, read_mask, read_begins = store.read(start, stop)
            assert read.dtype == np.int64
            assert read.tolist() == tokens[start:stop].tolist()
            assert read_mask.tolist() == mask[start:stop].tolist()
            assert read_begins.tolist() == [b - start for b in begins if start <= b < stop]


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 100_000
    documents = _documents([50], high=100_000)
    assert _write(tmp_path / "s", documents, tokenizer=tokenizer)["dtype"] == "uint32"
    assert TokenStore(tmp_path / "s", "x").read(0, 50)[0].tolist() == documents[0].tolist()


def test_the_content_hash_sees_every_token_and_boundary_but_not_the_files(tmp_path):
    documents = _documents([5, 7, 9])
    hashes = [
        _write(tmp_path / "a", documents)["content"],
        _write(tmp_path / "b", documents, shard_tokens=1000)["content"],
        _write(tmp_path / "c", [documents[0], np.concatenate(documents[1:])])["content"],
        _write(tmp_path / "d", [*documents[:2], (documents[2] + 1) % 257])["content"],
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_an_empty_store_and_the_first_id_too_large(tmp_path):
    _write(tmp_path / "empty", [])
    assert TokenStore(tmp_path / "empty", "x").tokens == 0
    documents = [np.array([1, 2]), np.array([3] * 12), np.array([4, 200, 5])]
    _write(tmp_path / "s", documents)
    store = TokenStore(tmp_path / "s", "x")
    assert store.find_above(200) == (2, 200)
    assert store.find_above(201) == (-1, -1)


def test_damage_is_named(tmp_path):
    _write(tmp_path / "s", _documents([30]))
    bins = tmp_path / "s" / "00000.bin"
    bins.write_bytes(bins.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"data\.sources\.x: .*00000\.bin has 58 bytes, its meta\.json says 60"):
        TokenStore(tmp_path / "s", "data.sources.x")
    (tmp_path / "s" / "meta.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        TokenStore(tmp_path / "s", "data.sources.x")
    with pytest.raises(ValueError, match=r"data\.sources\.x: .*not a token store"):
        TokenStore(tmp_path, "data.sources.x")
