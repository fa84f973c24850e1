"""A hang is reported on every rank, with who waits where, and the process ends."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from moetrain.comm.collectives import all_reduce_sum
from moetrain.comm.watchdog import Watchdog
from moetrain.testing import RankFailure, run_ranks

pytestmark = pytest.mark.distributed


def meet():
    """What a rank's first collective imports and connects is not to count as a hang on a busy machine."""
    all_reduce_sum(torch.ones(()), dist.group.WORLD)


def test_every_rank_says_where_it_is_and_who_is_elsewhere(tmp_path, capfd, monkeypatch):
    folder = tmp_path / "hangs" / "0123"
    write = Watchdog._write

    def slowly(watchdog, name, text):
        write(watchdog, name, text)
        time.sleep(0.5 * (name == "summary.txt"))  # others see it and exit, which ends all

    monkeypatch.setattr(Watchdog, "_write", slowly)

    def work():
        meet()
        with Watchdog(folder, timeout_s=6.0) as watchdog:
            for step in range(1, 5):
                watchdog.beat(f"step {step}")
                if step == 3 and dist.get_rank() == 2:
                    time.sleep(600)
                all_reduce_sum(torch.ones(()), dist.group.WORLD)
        return "unreachable"

    with pytest.raises(RankFailure, match="died"):
        run_ranks(work, 4)
    reports = {rank: (folder / f"rank_{rank:05d}.txt").read_text() for rank in range(4)}
    for rank, text in reports.items():
        head, doing = text.splitlines()[:2]
        assert head.startswith(f"rank {rank} of 4 (pid ")
        assert "step 3: " in head
        assert "thread MainThread" in text
        if rank == 2:
            assert "is in no collective but in work (" in doing
            assert "time.sleep(600)" in text
        else:
            assert "waits in all_reduce, called by all_reduce_sum (moetrain/comm/collectives.py:" in doing
    summary = (folder / "summary.txt").read_text()
    assert "ranks 0, 1, 3: waits in all_reduce" in summary
    assert "ranks 2: is in no collective" in summary
    said = capfd.readouterr().err
    assert all(text.splitlines()[0] in said for text in reports.values())
    assert summary.splitlines()[0] in said


def test_a_run_that_moves_or_may_take_its_time_is_left_alone(tmp_path):
    def work():
        with Watchdog(tmp_path / "a", timeout_s=6.0) as watchdog:
            for _ in range(70):
                time.sleep(0.1)
                watchdog.beat("step")
        with Watchdog(tmp_path / "b", timeout_s=0.0):
            time.sleep(0.5)
        time.sleep(1.0)  # a dog that has gone home does not bite
        return "done"

    assert run_ranks(work, 2) == ["done", "done"]
    assert not list(tmp_path.iterdir())


def test_a_run_that_outlasts_its_grace_is_ended(tmp_path):
    def work():
        with Watchdog(tmp_path, timeout_s=4.0) as watchdog:
            watchdog.end_within(0.5, "SIGTERM")
            while True:
                time.sleep(0.1)
                watchdog.beat("step")

    with pytest.raises(RankFailure, match="died"):
        run_ranks(work, 1)
    assert "not over 0 s after SIGTERM" in (tmp_path / "rank_00000.txt").read_text()


def test_a_rank_that_cannot_report_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrain.comm.watchdog._WAIT_FOR_OTHERS_S", 5.0)

    def work():
        meet()
        with Watchdog(tmp_path, timeout_s=4.0) as watchdog:
            watchdog.beat("step 1")
            if dist.get_rank() == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            all_reduce_sum(torch.ones(()), dist.group.WORLD)

    with pytest.raises(RankFailure, match="died"):
        run_ranks(work, 2)
    summary = (tmp_path / "summary.txt").read_text()
    assert "ranks 1: waits in all_reduce" in summary
    assert "ranks 0: no report" in summary
