"""The fp64 proof under NCCL: two GPUs against one. All precisions: scripts/invariance.sh --device cuda."""

import pytest
import torch

from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL, write_documents
from moetrain.testing.trajectory import compare, record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


AXES = ["ep", "dp_replicate", "tp", "cp", "pp", "etp"]


@pytest.mark.parametrize("degrees", [[], *([f"parallel.{axis}=2"] for axis in AXES)], ids=str)
def test_two_gpus_equal_one_in_fp64(degrees, tmp_path):
    documents = write_documents(tmp_path)
    options = [*SMALL_MODEL, *documents, "train.precision=fp64", *degrees]
    one = [*SMALL_MODEL, *documents, "train.precision=fp64", f"run.dir={tmp_path / 'one'}", "train.micro_batch=4"]
    single, _ = run_ranks(record, 1, one, 20, backend="nccl")[0]
    two = [*options, f"run.dir={tmp_path / 'two'}", "train.micro_batch=2"]
    run, _ = run_ranks(record, 2, two, 20, backend="nccl")[0]
    difference = compare(run, single)
    print(f"{degrees}: {difference}")
    assert max(difference.loss, difference.norm, difference.gradient) < 1e-9, difference
