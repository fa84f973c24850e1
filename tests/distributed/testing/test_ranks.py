import time

import pytest
import torch
import torch.distributed as dist

from moetrain.testing import RankFailure, ranks, run_ranks

pytestmark = pytest.mark.distributed


def test_ranks_talk_and_results_come_back_in_order():
    def fn(offset):
        x = torch.tensor([float(dist.get_rank() + offset)])
        dist.all_reduce(x)
        return dist.get_rank(), x

    assert run_ranks(fn, 3, 10) == [(r, torch.tensor([33.0])) for r in range(3)]


def test_a_failing_rank_is_named_and_does_not_hang_the_others():
    def fn():
        if dist.get_rank() == 1:
            raise KeyError("needle")
        dist.barrier()

    with pytest.raises(RankFailure, match=r"rank 1 of 2 failed(.|\n)*needle"):
        run_ranks(fn, 2)


def test_who_failed_first_is_named_even_if_others_have_failed_before_we_look(monkeypatch):
    def fn():
        if dist.get_rank() == 2:
            raise KeyError("needle")
        dist.barrier()

    plain = ranks.wait
    monkeypatch.setattr(ranks, "wait", lambda pipes, timeout: time.sleep(0.5) or plain(pipes, timeout))
    with pytest.raises(RankFailure, match=r"rank 2 of 3 failed(.|\n)*needle"):
        run_ranks(fn, 3)


def test_a_rank_that_stays_away_fails_the_others_by_their_time_limit():
    def fn():
        if dist.get_rank() == 1:
            time.sleep(60)
        dist.all_reduce(torch.zeros(1))

    with pytest.raises(RankFailure):
        run_ranks(fn, 2, timeout_s=2)
