"""Several ranks open one source at once: one of them tokenises it, all of them read the same."""

import json
import multiprocessing

import pytest

from moetrain.config.data import SourceConfig
from moetrain.data import tokenize
from moetrain.data.store import TokenStore
from moetrain.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.distributed


def _rank(path, cache, barrier, results):
    barrier.wait()
    target = tokenize.cached_stores("x", SourceConfig(kind="jsonl", path=path), ByteTokenizer(), 5.0, cache)
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
