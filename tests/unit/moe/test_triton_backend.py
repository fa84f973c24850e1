"""experts=triton: the trainer's seam to the kernels, interpreted in a process of its own; refusals without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetrain.moe.experts.triton import build

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[3]


def test_the_backend_equals_the_reference():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    script = str(Path(__file__).with_name("interpreted_backend.py"))
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="experts=reference"):
        build("fp64", "cuda", 32, 16)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="experts=reference"):
            build("bf16", "cpu", 32, 16)
