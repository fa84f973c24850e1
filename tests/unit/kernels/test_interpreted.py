"""Runs the interpreter tests in a process of their own, and the compile check in another.

Triton decides at import whether to interpret, so the setting must not leak into, or come late for, other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[3]


def run(*arguments: str, interpret: bool) -> subprocess.CompletedProcess:
    env = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "PYTHONPATH": str(ROOT / "kernels")}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "name",
    [
        "interpreted.py",
        "interpreted_pieces.py",
        "interpreted_router.py",
        "interpreted_dtypes.py",
        "interpreted_model.py",
    ],
)
def test_kernels_under_the_interpreter(name):
    cases = Path(__file__).with_name(name)
    result = run("pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases), interpret=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "skipped" not in result.stdout


@pytest.mark.parametrize("arch", ["90", "80"])
def test_every_kernel_compiles_without_a_gpu(arch):
    result = run("moetrain_kernels.compile_check", "--arch", arch, interpret=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "weight_grad_kernel" in result.stdout
    assert "route_topk_grad_kernel" in result.stdout
