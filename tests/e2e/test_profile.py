"""`moetrain profile` on a real model: every part is found, and the parts add up to the step."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e


def test_the_parts_of_a_real_step_add_up(tmp_path):
    out = tmp_path / "profile"
    command = [sys.executable, "-m", "moetrain", "profile", "experiment=quickstart", "train.seq_len=64", f"out={out}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=2) for line in (out / "shares_rank0.txt").read_text().splitlines()[1:]]
    share = {name.strip(): float(percent.rstrip("%")) for name, _, percent in rows}
    ms = {name.strip(): float(time) for name, time, _ in rows}  # a small part's share may be 0.0% on a busy machine
    for part in ("attention", "router", "dispatch (exposed)", "experts", "head and loss", "optimizer"):
        assert ms.get(part, 0) > 0, (part, rows)
    assert sum(share.values()) == pytest.approx(200, abs=0.1 * len(share))  # the parts, and the step itself
    assert not (out / "run" / "checkpoints").exists() or not any((out / "run" / "checkpoints").iterdir())
