import gzip
import sysconfig
from pathlib import Path

import datasets
import pytest

from moetrain.config.data import SourceConfig
from moetrain.data.documents import DocumentReader
from moetrain.data.readers import open_source
from moetrain.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.unit
TOKENIZER = ByteTokenizer()


def _read(config, where="data.sources.x"):
    reader = DocumentReader(where, config, TOKENIZER)
    return [d for shard in open_source(where, config).shards for d in reader.read(shard)]


def _texts(config):
    documents = _read(config)
    assert all(d.ids_N[-1] == TOKENIZER.eos_id for d in documents)
    return [TOKENIZER.decode(d.ids_N) for d in documents]


def _parquet(path, texts):
    datasets.Dataset.from_dict({"text": texts, "other": list(range(len(texts)))}).to_parquet(str(path))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "arrow_file", "arrow_dict", "hub"])
def test_every_kind_reads_the_same_rows(kind, streaming, tmp_path, texts, write_jsonl):
    dataset = datasets.Dataset.from_dict({"text": texts})
    config = SourceConfig(kind=kind.split("_")[0], path=str(tmp_path), streaming=streaming)
    if kind == "jsonl":
        write_jsonl([{"text": t, "n": 1} for t in texts])
    elif kind == "parquet":
        _parquet(tmp_path / "a.parquet", texts)
    elif kind == "arrow":
        dataset.save_to_disk(tmp_path / "saved")
        config.path = str(tmp_path / "saved")
    elif kind == "arrow_dict":
        datasets.DatasetDict({"train": dataset.select([0]), "all": dataset}).save_to_disk(tmp_path / "saved")
        config.path, config.split = str(tmp_path / "saved"), "all"
    elif kind == "arrow_file":
        dataset.save_to_disk(tmp_path / "saved")
        config.path = str(tmp_path / "saved" / "*.arrow")
    else:  # a directory in place of a hub name
        (tmp_path / "data").mkdir()
        _parquet(tmp_path / "data" / "train-00000.parquet", texts)
    assert _texts(config) == texts


def test_a_text_file_is_one_document_and_files_are_sorted(tmp_path):
    for name, text in {"b.txt": "second\nfile", "a/x.md": "first", "c.bin": "not text"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with gzip.open(tmp_path / "z.txt.gz", "wt") as f:
        f.write("packed")
    config = SourceConfig(kind="text", path=str(tmp_path))
    assert _texts(config) == ["first", "second\nfile", "packed"]
    assert [d.name for d in _read(config)] == ["a/x.md", "b.txt", "z.txt.gz"]
    assert _texts(SourceConfig(kind="text", path=str(tmp_path / "*.txt"))) == ["second\nfile"]
    assert _texts(SourceConfig(kind="text", path=str(tmp_path / "c.bin"))) == ["not text"]


def test_the_standard_library_without_its_tests():
    documents = _read(SourceConfig())
    by_name = {d.name: d for d in documents}
    source = Path(sysconfig.get_paths()["stdlib"], "json/decoder.py").read_text(encoding="utf-8")
    assert TOKENIZER.decode(by_name["json/decoder.py"].ids_N) == source
    assert list(by_name) == sorted(by_name)
    assert not [n for n in by_name if {"test", "tests", "idle_test", "site-packages"} & set(n.split("/"))]
    assert sum(len(d.ids_N) for d in documents) > 5_000_000


def test_documents_are_named_by_file_and_row(write_jsonl, tmp_path):
    write_jsonl([{"text": "a"}, {"text": ""}, "", {"text": "b"}], "one/a.jsonl")
    write_jsonl([{"text": "c"}], "two/a.jsonl")
    documents = _read(SourceConfig(kind="jsonl", path=str(tmp_path / "*" / "a.jsonl")))
    # Empty rows and lines give no document but are counted.
    assert [(d.name, d.row) for d in documents] == [("one/a.jsonl:0", 0), ("one/a.jsonl:3", 3), ("two/a.jsonl:0", 0)]


@pytest.mark.parametrize("first", [0, 1, 63, 64, 65, 130])
def test_reading_on_from_a_row(first, write_jsonl):
    config = SourceConfig(kind="jsonl", path=write_jsonl([{"text": f"text {i}"} for i in range(131)]))
    (shard,) = open_source("x", config).shards
    rows = [d.row for d in DocumentReader("x", config, TOKENIZER).read(shard, first_row=first)]
    assert rows == list(range(first, 131))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": None}], r"row 1 of rows\.jsonl: None \(NoneType\) in column 'text' is not text"),
        ([{"text": "a"}, {"text": 17}], r"row 1 of rows\.jsonl: 17 \(int\) in column 'text' is not text"),
        ([{"text": ["a"]}], r"row 0 of rows\.jsonl: \['a'\] \(list\) in column 'text' is not text"),
        ([{"text": "a"}, "not json"], r"row 1 of rows\.jsonl: 'not json' \(str\) is not JSON"),
        (["[1, 2]"], r"row 0 of rows\.jsonl: \[1, 2\] \(list\) is not a JSON object"),
        ([{"text": "a"}, {"txt": "b"}], r"row 1 of rows\.jsonl has no column 'text'; did you mean 'txt'\?"),
    ],
)
def test_a_row_that_is_not_text(rows, message, write_jsonl):
    with pytest.raises(ValueError, match=r"^data\.sources\.x: " + message):
        _read(SourceConfig(kind="jsonl", path=write_jsonl(rows)))


@pytest.mark.parametrize("values", [[b"a", b"b"], [1, 2], ["a", None]])
def test_a_parquet_column_that_is_not_text(values, tmp_path):
    datasets.Dataset.from_dict({"text": values}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"data\.sources\.x: row . of a\.parquet: .* in column 'text' is not text"):
        _read(SourceConfig(kind="parquet", path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data\.sources\.x: row 0 of a\.parquet has no column 'body'.*text"):
        _read(SourceConfig(kind="parquet", path=str(tmp_path), text_column="body"))


def test_ids_are_checked_against_the_vocabulary(write_jsonl):
    def read(*values):
        return _read(SourceConfig(kind="jsonl", path=write_jsonl([{"ids": v} for v in values]), ids_column="ids"))

    assert [d.ids_N.tolist() for d in read([1, 2], [], [3, 256])] == [[1, 2, 256], [3, 256]]
    place = r"^data\.sources\.x: row 1 of rows\.jsonl: "
    for bad, problem in {
        257: r"257 \(int\) in column 'ids' is outside the vocabulary of data\.tokenizer='byte', \[0, 257\)",
        -1: r"-1 \(int\) in column 'ids' is outside the vocabulary",
        1.5: r"1\.5 \(float\) in column 'ids' is not a token id",
        None: r"None \(NoneType\) in column 'ids' is not a token id",
    }.items():
        with pytest.raises(ValueError, match=place + problem):
            read([1], [2, bad])
    with pytest.raises(ValueError, match=place + r"'text' \(str\) in column 'ids' is not a list of token ids"):
        read([1], "text")


def test_the_mask_is_per_character_and_the_end_follows_the_last(write_jsonl):
    path = write_jsonl([{"text": "a€b", "m": [1, 0, 1]}, {"text": "xy", "m": [1, 0]}])
    documents = _read(SourceConfig(kind="jsonl", path=path, mask_column="m"))
    assert [d.mask_N.tolist() for d in documents] == [[1, 0, 0, 0, 1, 1], [1, 0, 0]]


def test_a_token_with_a_masked_character_is_not_learnt(write_jsonl):
    class Pairs(ByteTokenizer):  # two characters a token
        def spans(self, texts):
            import numpy as np

            return [(np.array([1, 2]), np.array([[0, 2], [2, 4]])) for _ in texts]

    config = SourceConfig(kind="jsonl", path=write_jsonl([{"text": "abcd", "m": [1, 0, 1, 1]}]), mask_column="m")
    (shard,) = open_source("x", config).shards
    (document,) = DocumentReader("x", config, Pairs()).read(shard)
    assert document.mask_N.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 2, 1], "is not a list of 0 and 1"),
        ("111", "is not a list of 0 and 1"),
        ([1], "has 1 entries for 3 characters"),
    ],
)
def test_a_mask_that_does_not_fit(mask, message, write_jsonl):
    path = write_jsonl([{"text": "abc", "m": mask}])
    with pytest.raises(ValueError, match=r"data\.sources\.x: row 0 of rows\.jsonl: .* in column 'm' " + message):
        _read(SourceConfig(kind="jsonl", path=path, mask_column="m"))


def test_files_that_are_not_there_or_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"data\.sources\.x\.path='.*nowhere' does not exist"):
        _read(SourceConfig(kind="jsonl", path=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"data\.sources\.x\.path=.*no file of it ends in \.parquet"):
        _read(SourceConfig(kind="parquet", path=str(tmp_path)))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(
        ValueError, match=r"data\.sources\.x: latin\.txt, after row 0: cannot be read: UnicodeDecodeError"
    ):
        _read(SourceConfig(kind="text", path=str(tmp_path)))
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"data\.sources\.x: a\.parquet, after row 0: cannot be read"):
        _read(SourceConfig(kind="parquet", path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data\.sources\.x: dataset '.*/gone' cannot be opened"):
        _read(SourceConfig(kind="hub", path=str(tmp_path / "gone")))
