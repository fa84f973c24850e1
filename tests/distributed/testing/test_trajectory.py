"""What a recorded run is made of."""

import pytest
import torch

from moetrain.optim.adamw import FusedAdamW
from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL
from moetrain.testing.trajectory import compare, record

pytestmark = pytest.mark.distributed


def test_recorded_gradients_are_those_of_the_update_whoever_clips(documents, tmp_path, monkeypatch):
    def run(name):
        return run_ranks(record, 1, [*SMALL_MODEL, *documents, f"run.dir={tmp_path / name}"], 2)[0][0]

    clipped_before = run("plain")
    assert clipped_before[0].row["grad_norm"] > 0.5, "clipping took no part"
    monkeypatch.setattr(torch.optim, "AdamW", FusedAdamW)  # as on GPUs
    assert compare(run("fused"), clipped_before).worst < 1e-5
