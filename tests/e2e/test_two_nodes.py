"""Two "nodes" on loopback addresses: launch/torchrun.sh started twice, one process each, one run between them."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from moetrain.testing.ports import free_port

pytestmark = pytest.mark.e2e

REPOSITORY = Path(__file__).parents[2]

# Rank 1 dies once, in the middle of a collective; the launcher must bring both ranks together again.
STUB = """
import json, os, pathlib, sys
import torch, torch.distributed as dist

out = pathlib.Path(sys.argv[2])
dist.init_process_group("gloo")
died = out / "died"
if dist.get_rank() == 1 and not died.exists():
    died.touch()
    os._exit(9)
total = torch.ones(())
dist.all_reduce(total)
seen = {"rank": dist.get_rank(), "node": os.environ["NODE_RANK"], "total": total.item(), "argv": sys.argv[1:]}
(out / f"rank{dist.get_rank()}").write_text(json.dumps(seen))
dist.destroy_process_group()
"""


def run_two_nodes(tmp_path, arguments, seconds, **environment):
    """Start both nodes and wait for them; fails with the end of their logs unless both exit 0."""
    common = {
        "NNODES": "2",
        "NPROC": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "MAX_RESTARTS": "0",
        "GRACE": "5",
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels"), str(tmp_path)]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    logs = [tmp_path / f"node{rank}.log" for rank in (0, 1)]
    nodes = []
    with ExitStack() as stack:
        for rank, log in enumerate(logs):
            node = {"NODE_RANK": str(rank), "LOCAL_ADDR": f"127.0.0.{rank + 1}"}
            nodes.append(
                subprocess.Popen(
                    [str(REPOSITORY / "launch" / "torchrun.sh"), *arguments],
                    env={**os.environ, **common, **environment, **node},
                    cwd=tmp_path,
                    stdout=stack.enter_context(log.open("w")),
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        try:
            codes = [node.wait(seconds) for node in nodes]
        finally:
            for node in nodes:
                if node.poll() is None:
                    os.killpg(node.pid, signal.SIGKILL)
                    node.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_nodes_meet_again_after_a_failure(tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    out = tmp_path / "out"
    out.mkdir()
    arguments = [str(out), "parallel.ep=2", "x=[a, b]"]
    run_two_nodes(tmp_path, arguments, seconds=240, MODULE="stub", MAX_RESTARTS="2")
    assert (out / "died").exists()
    ranks = [json.loads((out / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert sorted(rank["node"] for rank in ranks) == ["0", "1"]  # not two groups of one node each
    assert [rank["total"] for rank in ranks] == [2.0, 2.0]
    assert ranks[0]["argv"] == ranks[1]["argv"] == ["train", *arguments]


def test_two_nodes_train_together(tmp_path):
    run_dir = tmp_path / "run"
    overrides = ["experiment=quickstart", "train.steps=3", "train.global_batch=4", "train.micro_batch=1"]
    overrides += ["train.seq_len=64", "train.eval_every=0", "parallel.ep=2", "tracker=none"]
    run_two_nodes(tmp_path, [*overrides, "run.log_samples=true", f"run.dir={run_dir}"], seconds=300)
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["loss"] < 10 for row in rows)
    samples = read_rows(run_dir / "samples.jsonl")
    assert sorted((row["step"], row["dp"]) for row in samples) == [(step, dp) for step in (1, 2, 3) for dp in (0, 1)]
    for step in (1, 2, 3):
        first, second = (set(row["ids"]) for row in samples if row["step"] == step)
        assert len(first) == len(second) == 2
        assert not first & second
