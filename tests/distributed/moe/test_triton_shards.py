"""experts=triton and the router's kernels on weights divided by ep, etp, and FSDP: gradients as the reference has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["interpreted_shards.py", "interpreted_copies.py"])
def test_divided_weights_equal_the_reference(name):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    script = str(Path(__file__).with_name(name))
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False, timeout=400)
    assert done.stdout.endswith("equal\n"), done.stdout + done.stderr
