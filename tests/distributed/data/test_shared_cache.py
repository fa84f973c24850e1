"""Several processes at one store: ranks that open one source at once, and workers that tokenise it together."""

import json
import multiprocessing

import pytest

from moetrain.config.data import SourceConfig
from moetrain.data import build
from moetrain.data.documents import DocumentReader
from moetrain.data.hashing import place
from moetrain.data.readers import open_source
from moetrain.data.store import TokenStore
from moetrain.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.distributed


def _rank(path, cache, barrier, results):
    barrier.wait()
    target = build.cached_stores("x", SourceConfig(kind="jsonl", path=path), ByteTokenizer(), 5.0, cache)
    store = TokenStore(target / "train", "x")
    results.put((str(target), store.content, (target / "train").stat().st_ino))


def test_ranks_that_start_together_share_one_store(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(2000)))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    ranks = [context.Process(target=_rank, args=(str(path), tmp_path / "cache", barrier, results)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    answers = {results.get(timeout=120) for _ in ranks}
    for rank in ranks:
        rank.join(timeout=60)
    assert len(answers) == 1
    assert all(rank.exitcode == 0 for rank in ranks)
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == ["", ".lock"]  # no leftovers


def test_workers_write_what_one_process_writes(tmp_path):
    for i in range(5):
        lines = (json.dumps({"text": f"document {i} {j}"}) + "\n" for j in range(40))
        (tmp_path / f"{i}.jsonl").write_text("".join(lines))
    config = SourceConfig(kind="jsonl", path=str(tmp_path))
    reader, source = DocumentReader("x", config, ByteTokenizer()), open_source("x", config)
    assert len(build._groups(source, 2500)) > 1  # work for both
    metas = []
    for workers in (0, 2):
        plan = build.StorePlan(20.0, shard_tokens=300, group_bytes=2500, workers=workers)
        metas.append(build.write_stores(reader, source, tmp_path / f"out{workers}", plan))
        assert sorted(p.name for p in (tmp_path / f"out{workers}").iterdir()) == ["train", "validation"]
    assert metas[0] == metas[1]
    stores = [TokenStore(tmp_path / f"out{workers}" / "train", "x") for workers in (0, 2)]
    tokens = [store.read(0, store.tokens)[0] for store in stores]
    assert tokens[0].tolist() == tokens[1].tolist()
    documents = [d for shard in source.shards for d in reader.read(shard) if place(d.name) >= 0.2]
    assert tokens[0].tolist() == [int(i) for d in documents for i in d.ids_N]
