"""Nodes that were started with other values, or that hold other data, are refused before the first step."""

from __future__ import annotations

import json
import re

import pytest
import torch.distributed as dist

from moetrain.checkpoint import alike
from moetrain.checkpoint.alike import check_one_directory, check_same
from moetrain.testing import RankFailure, run_ranks
from moetrain.testing.small import SMALLEST_MODEL
from moetrain.testing.trajectory import new_trainer

pytestmark = pytest.mark.distributed


def _open(overrides, of_last):
    """Only the last rank takes `of_last` too. What it says where it is refused."""
    last = dist.get_rank() == dist.get_world_size() - 1
    try:
        new_trainer(["experiment=quickstart", *SMALLEST_MODEL, *overrides, *(of_last if last else [])]).close()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("key", "there", "here"),
    [("optim.lr", "0.003", "0.002"), ("parallel.ep", "1", "2"), ("train.max_loss", "None", "7.0")],
)
def test_another_value_on_one_node_is_named_on_all(key, there, here, tmp_path):
    """With the layout of each its own, ranks would wait for each other for ever."""
    told = run_ranks(_open, 2, [f"run.dir={tmp_path}", "optim.lr=0.003"], [f"{key}={here}"])
    assert told[0] == told[1]
    assert told[0].startswith("ranks were started differently: ")
    assert f"{key}={there} on 1 of 2 (rank 0), {here} on 1 of 2 (rank 1)" in told[0]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_data_may_lie_elsewhere_on_a_node_but_must_be_the_same(streaming, tmp_path):
    texts = [f"{i} " + "abcdefgh" * (i % 5 + 1) for i in range(60)]
    for name, lines in {"here": texts, "copy": texts, "other": [text.swapcase() for text in texts]}.items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (tmp_path / name / "rows.jsonl").write_text(text)

    def opened(name):
        path = "data.sources.jsonl.path="
        data = ["data=jsonl", f"data.sources.jsonl.streaming={streaming}", f"{path}{tmp_path / 'here'}"]
        of_last = [f"{path}{tmp_path / name}", f"data.cache_dir={tmp_path / 'cache' / name}"]
        return run_ranks(_open, 2, [f"run.dir={tmp_path / 'run'}", *data], of_last)

    assert opened("copy") == ["", ""]
    for told in opened("other"):
        assert told.startswith("ranks were started differently: data as read: ")
        assert "jsonl=" in told


def test_other_code_on_one_node_is_refused(tmp_path):
    def start():
        if dist.get_rank() == 1:
            alike.digest_of = lambda package: "stale"  # in a rank of its own
        return _open([f"run.dir={tmp_path}"], [])

    for told in run_ranks(start, 2):
        assert re.search(r"differently: code of moetrain=\w+ on 1 of 2 \(rank 0\), stale on 1 of 2 \(rank 1\); ", told)
        assert "code of moetrain_kernels=" in told


def test_ranks_that_differ_are_counted():
    def differ():
        check_same({"a": 1, "b": dist.get_rank() // 2, "c": None})

    with pytest.raises(RankFailure, match=r"differently: b=0 on 2 of 4 \(rank 0\), 1 on 2 of 4 \(rank 2\); start all"):
        run_ranks(differ, 4)


def test_secrets_that_differ_are_not_told():
    def differ():
        check_same({"tracker.wandb.api_key": f"secret{dist.get_rank()}"})

    with pytest.raises(RankFailure, match=r"api_key=\*\*\* on 1 of 2 \(rank 0\), \*\*\* on 1 of 2 \(rank 1\)"):
        run_ranks(differ, 2)


def test_a_directory_of_each_node_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(alike, "PATIENCE_S", 0.5)
    for rank in range(4):
        (tmp_path / str(rank)).mkdir()

    def look(shared):
        check_one_directory(tmp_path / ("0" if shared else str(min(dist.get_rank(), 1))))

    run_ranks(look, 4, True)
    with pytest.raises(
        RankFailure, match=r"[01] is not rank 0's directory on 3 ranks \(first: 1\); nearest legal value"
    ):
        run_ranks(look, 4, False)
    assert not list(tmp_path.rglob(".seen-*"))
