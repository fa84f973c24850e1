"""`python -m moetrain` and torchrun as a user runs them: exit codes, files, refusals, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
SMALL = [
    "experiment=quickstart",
    "model.n_layers=2",
    "model.d_model=32",
    "model.attention.head_dim=8",
    "model.attention.n_heads=4",
    "model.attention.n_kv_heads=2",
    "model.moe.d_expert=16",
    "train.seq_len=32",
    "train.global_batch=8",
    "train.eval_batches=1",
]


def environment():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def command(verb, *arguments, ranks=0):
    start = [sys.executable, "-m"]
    if ranks:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [*start, "moetrain", verb, *arguments]


def run(verb, *arguments, ranks=0, cwd=None, timeout=300):
    return subprocess.run(
        command(verb, *arguments, ranks=ranks),
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_four_ranks_train_then_a_finished_run_resumes_to_nothing(tmp_path):
    run_dir = tmp_path / "run"
    overrides = [*SMALL, "train.steps=4", "train.eval_every=2", "parallel.ep=4", f"run.dir={run_dir}"]
    done = run("train", *overrides, "run.log_samples=true", ranks=4)
    assert done.returncode == 0, done.stderr
    assert "resume" in done.stdout
    assert "moetrain report" in done.stdout
    steps = rows(run_dir)
    assert [row["step"] for row in steps] == [0, 1, 2, 3, 4]
    assert set(steps[0]) == {"step", "val_loss"}
    for row in steps[1:]:
        assert {"loss", "ce_loss", "grad_norm", "lr", "tokens", "tokens_per_s", "tokens_per_s_per_gpu"} <= set(row)
        assert row["mfu"] is None
        assert row["aux/switch"] > 0
        assert row["aux/z_loss"] > 0
        assert row["loss"] == pytest.approx(row["ce_loss"] + row["aux/switch"] + row["aux/z_loss"])
        for layer in (0, 1):
            for key in ("load_max_over_mean", "load_cv", "router_entropy", "dead_experts", "dropped_share"):
                assert f"moe/{layer}/{key}" in row
        assert row["rank_load_max_over_mean"] == max(row[f"moe/{n}/rank_load_max_over_mean"] for n in (0, 1)) >= 1
    assert [("val_loss" in row) for row in steps] == [True, False, True, False, True]
    checkpoint = run_dir / "checkpoints" / "step_00000004"
    assert {p.name for p in checkpoint.iterdir()} == {"model", "optim", "trainer.json", "manifest.json"}
    assert (run_dir / "config.yaml").exists()

    again = run("train", *overrides, "parallel.ep=2", ranks=2)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in rows(run_dir) if "event" not in row] == [0, 1, 2, 3, 4]

    said = run("generate", f"checkpoint={run_dir}", "prompt=def ", "max_tokens=5")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("def ")
    assert "step" in run("report", str(run_dir)).stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tp=2"], "parallel.tp=2"),
        (["train.stepz=2"], "train.steps"),
        (["experts=grouped_mm", "train.precision=fp64"], "experts"),
        (["optim.lr=-1"], "lr"),
        (["model.vocab_size=100"], "model.vocab_size"),
    ],
)
def test_a_refused_configuration_exits_with_2_and_one_line(tmp_path, overrides, words):
    done = run("train", *SMALL, "train.steps=1", f"run.dir={tmp_path / 'run'}", *overrides)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_verb_exits_with_2():
    assert run("trian").returncode == 2


def test_mesh_needs_no_model_and_prints_json():
    done = run("mesh", "world=16", "parallel.tp=2", "parallel.cp=2", "parallel.pp=2", "parallel.ep=8", "format=json")
    assert done.returncode == 0, done.stderr
    tables = json.loads(done.stdout)
    assert tables["attention"]["cp"][0] == [0, 2]
    assert tables["expert"]["ep"][0] == list(range(8))
    assert run("mesh", "world=16", "parallel.ep=3").returncode == 2


@pytest.mark.parametrize("ranks", [0, 2])
def test_sigterm_ends_with_a_checkpoint_and_the_run_goes_on_later(tmp_path, ranks):
    run_dir = tmp_path / "run"
    overrides = [*SMALL, "train.steps=100000", "train.eval_every=0", f"run.dir={run_dir}"]
    if ranks:
        overrides.append("parallel.ep=2")
    process = subprocess.Popen(command("train", *overrides, ranks=ranks), env=environment(), text=True)
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=120)
    if not ranks:
        assert code == 0  # torchrun itself reports the signal; a lone process stops as asked
    last = rows(run_dir)[-1]["step"]
    published = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert published == [f"step_{last:08d}"]
    resumed = run("train", *overrides, f"train.steps={last + 2}", ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in rows(run_dir) if "event" not in row] == list(range(1, last + 3))


def test_a_built_wheel_works_outside_the_repository(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    assert (site / "moetrain_kernels" / "__init__.py").exists()
    # -P and a foreign working directory: nothing of the repository is on the path.
    code = "import moetrain, sys; print(moetrain.__file__); from moetrain.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *SMALL, "train.steps=1", "run.dir=run"],
        cwd=tmp_path, env={**environment(), "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{re.escape(str(site))}", done.stdout)
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()
