"""Experts that move between two GPUs, with saves that copy to the host beside the training (fp64)."""

import pytest
import torch

from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL, write_documents
from moetrain.testing.trajectory import open_trainer, record, record_steps, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
ON = ["parallel.ep=2", "dispatch.placement.every=2", "dispatch.placement.threshold=1.0"]


def saved_on_the_way(options, pieces):
    """Train, saving after each piece, while the next one goes on."""
    trainer = open_trainer(options)
    run = []
    for steps in pieces:
        run += record_steps(trainer, steps)[0]
        trainer.save()
    trainer.saver.wait()
    trainer.close()
    return run


def test_moved_experts_change_no_number_and_no_checkpoint(tmp_path):
    options = [*SMALL_MODEL, *write_documents(tmp_path), "train.precision=fp64"]
    one = [*options, f"run.dir={tmp_path / 'one'}", "train.micro_batch=4"]
    single, _ = run_ranks(record, 1, one, 20, backend="nccl")[0]
    saving = [f"run.dir={tmp_path / 'two'}", "checkpoint.asynchronous=true", "checkpoint.every=1", "checkpoint.keep=0"]
    two = [*options, *ON, *saving, "train.micro_batch=2"]
    run = run_ranks(saved_on_the_way, 2, two, (5, 1, 14), backend="nccl")[0]
    assert sum(step.row.get("experts_moved", 0) for step in run) > 4
    assert worst(run, single) < 1e-9
    for step in (5, 6):
        back = [*one, f"run.dir={tmp_path / str(step)}", f"run.resume={tmp_path / 'two/checkpoints'}/step_{step:08}"]
        resumed, _ = run_ranks(record, 1, back, 3, backend="nccl")[0]
        assert worst(resumed, single[step:][:3]) < 1e-9
