import json
import os

import datasets
import numpy as np
import pytest

from moetrain.config.data import DataConfig, SourceConfig
from moetrain.data import build, tokenize
from moetrain.data.loader import Loader
from moetrain.data.store import TokenStore
from moetrain.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.unit


def _loader(tmp_path, source, **changes):
    config = DataConfig(sources={"x": source}, cache_dir=str(tmp_path / "cache"), validation_percent=20.0, **changes)
    sizes = {"seq_len": 32, "global_batch": 4, "micro_batch": 4, "dp_rank": 0, "dp_size": 1}
    return Loader(config, **sizes, seed=0, vocab_size=264)


def _steps(loader, n):
    return [batch for _ in range(n) for batch in loader.next_step()]


def _tokens(loader):
    tokens = [b.token_BS for b in _steps(loader, 3)] + [b.token_BS for (b,) in loader.validation(3)]
    loader.close()
    return np.concatenate(tokens)


@pytest.fixture
def options(write_jsonl, texts, tmp_path):
    path = write_jsonl([{"text": t} for t in texts])
    out = str(tmp_path / "made" / "store")
    # Numbers as the command line gives them.
    return {"source": {"kind": "jsonl", "path": path}, "out": out, "shard_tokens": "500", "validation_percent": "20"}


def test_training_on_shards_equals_training_on_their_source(options, tmp_path, capsys):
    tokenize.run(options)
    assert "data.sources.shards.path=" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "made/store/train/meta.json").read_text())["shards"]) > 2
    shards = _loader(tmp_path, SourceConfig(kind="shards", path=options["out"]))
    source = _loader(tmp_path, SourceConfig(**options["source"]))
    assert shards.fingerprint() == source.fingerprint()
    assert (_tokens(shards) == _tokens(source)).all()


def test_the_splits_share_nothing_and_lose_nothing(options, tmp_path, texts):
    found = {}
    for split in ("all", "train", "validation"):
        tokenize.run(options | {"split": split, "out": str(tmp_path / split)})
        for part in sorted(p.name for p in (tmp_path / split).iterdir()):
            store = TokenStore(tmp_path / split / part, "x")
            text = bytes(t if t < 256 else 0 for t in store.read(0, store.tokens)[0])
            found[split, part] = text.split(b"\0")[:-1]
    assert set(found) == {("all", "train"), ("all", "validation"), ("train", "train"), ("validation", "validation")}
    assert found["all", "train"] == found["train", "train"]
    assert found["all", "validation"] == found["validation", "validation"]
    assert sorted(found["all", "train"] + found["all", "validation"]) == sorted(t.encode() for t in texts)
    # 60 documents at 20 percent: five standard deviations of the binomial.
    assert abs(len(found["all", "validation"]) - 12) < 5 * np.sqrt(60 * 0.2 * 0.8)


def test_few_documents_still_hold_one_out(options, tmp_path, write_jsonl):
    rows = [{"text": "one"}, {"text": ""}, {"text": "two"}, {"text": "three"}]
    for split, texts in ("all", 2), ("train", 2):
        out = tmp_path / split
        source = {"kind": "jsonl", "path": write_jsonl(rows)}
        tokenize.run(options | {"source": source, "out": str(out), "split": split, "validation_percent": 1e-6})
        assert TokenStore(out / "train", "x").meta["documents"] == texts
    assert TokenStore(tmp_path / "all" / "validation", "x").meta["documents"] == 1
    whole = options | {"source": source, "out": str(tmp_path / "whole"), "validation_percent": 0}
    tokenize.run(whole)
    assert TokenStore(tmp_path / "whole" / "train", "x").meta["documents"] == 3


def test_one_store_is_training_data(options, tmp_path):
    tokenize.run(options)
    loader = _loader(tmp_path, SourceConfig(kind="shards", path=options["out"] + "/train"))
    loader.next_step()
    with pytest.raises(ValueError, match="nothing is held out of x"):
        next(loader.validation(1))
    loader.close()


def test_shards_of_another_tokenizer_or_with_a_wrong_id_are_refused(options, tmp_path):
    tokenize.run(options)
    source = SourceConfig(kind="shards", path=options["out"])
    meta = tmp_path / "made/store/train/meta.json"
    good = meta.read_text()
    meta.write_text(good.replace("byte-257", "0123"))
    with pytest.raises(
        ValueError, match=r"data\.sources\.x: .* tokenised by 'byte' \(fingerprint 0123\), .* \(byte-257\)"
    ):
        _loader(tmp_path, source)
    bins = np.memmap(tmp_path / "made/store/train/00000.bin", dtype=np.uint16, mode="r+")
    bins[1] = 999
    bins.flush()
    meta.write_text(good.replace('"max_id": 256', '"max_id": 999'))
    with pytest.raises(
        ValueError, match=r"data\.sources\.x: document 0 of .* has the id 999 .* outside the vocabulary"
    ):
        _loader(tmp_path, source)
    meta.write_text(good)  # damaged after it was written: found when the row is read
    loader = _loader(tmp_path, source)
    with pytest.raises(ValueError, match="data source x: row 0 of epoch 0 has the id 999, outside the vocabulary"):
        _steps(loader, 200)
    loader.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": ""}, "out is empty"),
        ({"split": "tain"}, "split='tain' is unknown; did you mean 'train'"),
        ({"outt": "x"}, "outt is not a key of tokenize; did you mean 'out'"),
        ({"source": {"kind": "jsnl", "path": "x"}}, "source.kind='jsnl' is unknown; did you mean 'jsonl'"),
        ({"source": {"knd": "jsonl"}}, "source.knd is not a key of tokenize; did you mean 'kind'"),
        ({"source": {"kind": "shards", "path": "x"}}, "source.kind=shards is tokenised already"),
        ({"shard_tokens": "many"}, "shard_tokens='many' is not of type int"),
        ({"workers": "-1"}, "workers=-1 is negative"),
        ({"source": {"streaming": "maybe"}}, r"source\.streaming='maybe' is not of type bool"),
        ({"eos_token": "</s>"}, "^eos_token='</s>' with tokenizer=byte, .* nearest legal value: \"\"$"),
        ({"validation_percent": 100}, r"validation_percent=100\.0 is outside"),
    ],
)
def test_bad_keys(change, message, options):
    with pytest.raises(ValueError, match=message):
        tokenize.run(options | change)


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(options, tmp_path, write_jsonl):
    tokenize.run(options)
    with pytest.raises(ValueError, match="exists already"):
        tokenize.run(options)
    bad = {
        "source": {"kind": "jsonl", "path": write_jsonl([{"text": None}], "bad.jsonl")},
        "out": str(tmp_path / "made/bad"),
    }
    with pytest.raises(ValueError, match=r"source: row 0 of bad\.jsonl: None"):
        tokenize.run(bad)
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["store"]


def test_the_cache_is_used_and_notices_a_change(tmp_path, write_jsonl, texts, monkeypatch):
    path = write_jsonl([{"text": t} for t in texts])
    config = SourceConfig(kind="jsonl", path=path)

    def cached():
        return build.cached_stores("x", config, ByteTokenizer(), 5.0, tmp_path / "cache")

    first = cached()
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_stores", None)  # would fail if it were called
        config.weight = 3.0
        assert cached() == first
    write_jsonl([{"text": t.swapcase()} for t in texts])  # as many bytes as before
    assert cached() != first


def test_a_cache_that_cannot_be_made_is_named(tmp_path, write_jsonl):
    config = SourceConfig(kind="jsonl", path=write_jsonl([{"text": "a"}]))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^data\.cache_dir=.*/file/cache cannot be made"):
        build.cached_stores("x", config, ByteTokenizer(), 0.0, tmp_path / "file" / "cache")


def test_sources_that_look_alike_do_not_share_a_store(tmp_path, write_jsonl, texts):
    """Unpacked archives: other texts under the same names, of the same sizes, changed at the same time."""
    read = {}
    for name, rows in {"one": texts, "two": [t.swapcase() for t in texts], "copy": texts}.items():
        path = write_jsonl([{"text": t} for t in rows], f"{name}/rows.jsonl")
        os.utime(path, ns=(10**18, 10**18))
        config = SourceConfig(kind="jsonl", path=path)
        stored = build.cached_stores("x", config, ByteTokenizer(), 0.0, tmp_path / "cache")
        store = TokenStore(stored / "train", "x")
        read[name] = stored, ByteTokenizer().decode(store.read(0, store.tokens)[0])
    assert read["two"][1] == "".join(texts).swapcase()
    assert read["one"] == read["copy"] != read["two"]  # a copy that kept its times still shares


def test_datasets_in_memory_do_not_share_a_store(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 1 << 30)
    stores = set()
    for text in "ab", "cd":
        datasets.Dataset.from_dict({"text": [text]}).save_to_disk(tmp_path / text)
        config = SourceConfig(kind="arrow", path=str(tmp_path / text))
        stores |= {build.cached_stores("x", config, ByteTokenizer(), 0.0, tmp_path / "cache") for _ in range(2)}
    assert len(stores) == 2


def test_a_lost_race_takes_the_winners_store(tmp_path):
    target = tmp_path / "store"
    with build.fresh_directory(target) as late:
        (late / "mine").touch()
        with build.fresh_directory(target) as winner:
            (winner / "theirs").touch()
    assert [p.name for p in target.iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
