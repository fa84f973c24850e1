"""A rank that stays away leaves the others waiting inside NCCL: the report names the collective they wait for."""

import time

import pytest
import torch
import torch.distributed as dist

from moetrain.comm.watchdog import Watchdog
from moetrain.testing import RankFailure, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")]


def hang(folder):
    x = torch.ones(4, device="cuda")
    with Watchdog(folder, timeout_s=3.0) as watchdog:
        for step in range(1, 4):
            watchdog.beat(f"step {step}")
            if step == 3 and dist.get_rank() == 1:
                time.sleep(600)
            dist.all_reduce(x)
            x.sum().item()


def test_a_rank_that_stays_away_is_told_from_those_that_wait(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "2000")
    with pytest.raises(RankFailure, match="died"):
        run_ranks(hang, 2, tmp_path, backend="nccl")
    waits, away = ((tmp_path / f"rank_0000{rank}.txt").read_text() for rank in (0, 1))
    assert "step 3: no progress" in waits
    assert "item()" in waits
    assert "time.sleep(600)" in away
    assert "all_reduce" in (tmp_path / "rank_00000.nccl.txt").read_text()
