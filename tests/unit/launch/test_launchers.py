"""The launchers with stand-ins for torchrun and Slurm that write down how they were called."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).parents[3]

# Writes one line: its name, the variables in SHOW, its arguments (tab-separated).
RECORD = r"""#!/usr/bin/env bash
{ printf '%s' "$(basename "$0")"; for name in $SHOW; do printf '\t%s=%s' "$name" "${!name:-}"; done
  (( $# )) && printf '\t%s' "$@"; printf '\n'; } >>"$RECORD_TO"
"""


def write_tool(directory, name, body=""):
    path = directory / name
    path.write_text(RECORD + body)
    path.chmod(0o755)
    return path


@pytest.fixture
def tools(tmp_path):
    directory = tmp_path / "bin"
    directory.mkdir()
    write_tool(directory, "python")
    return directory


def environment(tools, **variables):
    """A clean one: no launcher variable of this machine leaks in."""
    base = {"PATH": f"{tools}:{os.environ['PATH']}", "RECORD_TO": str(tools.parent / "calls"), "SHOW": ""}
    return {**base, "HOME": str(tools.parent), **variables}


def calls(tools):
    file = tools.parent / "calls"
    return [line.split("\t") for line in file.read_text().splitlines()] if file.exists() else []


def torchrun(tools, *arguments, **variables):
    return subprocess.run(
        [str(REPOSITORY / "launch/torchrun.sh"), *arguments],
        env=environment(tools, **variables),
        capture_output=True,
        text=True,
    )


def options(call):
    """torchrun's options of a recorded `python -m torch.distributed.run` call, and what it runs."""
    assert call[:3] == ["python", "-m", "torch.distributed.run"]
    end = call.index("-m", 2)
    return dict(zip(call[3:end:2], call[4:end:2], strict=True)), call[end:]


def test_one_node_needs_no_variables(tools):
    assert torchrun(tools, "experiment=quickstart", "x=[a, b]").returncode == 0
    (call,) = calls(tools)
    given, program = options(call)
    assert program == ["-m", "moetrain", "train", "experiment=quickstart", "x=[a, b]"]
    assert given == {
        "--nnodes": "1",
        "--nproc-per-node": "gpu",
        "--max-restarts": "3",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "localhost:29500",
        "--rdzv-id": "moetrain",
        "--rdzv-conf": "is_host=true",
    }


def test_every_variable_reaches_torchrun(tools):
    variables = {"NNODES": "2:4", "NPROC": "8", "NODE_RANK": "3", "RDZV_ENDPOINT": "head:1234", "RDZV_ID": "job"}
    variables |= {"MAX_RESTARTS": "7", "LOCAL_ADDR": "10.0.0.3", "MODULE": "stub", "GRACE": "60"}
    assert torchrun(tools, **variables, SHOW="TORCH_ELASTIC_SHUTDOWN_TIMEOUT OMP_NUM_THREADS").returncode == 0
    (call,) = calls(tools)
    assert call[1:3] == ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60", "OMP_NUM_THREADS=1"]
    given, program = options([call[0], *call[3:]])
    assert program == ["-m", "stub", "train"]
    assert given == {
        "--nnodes": "2:4",
        "--nproc-per-node": "8",
        "--max-restarts": "7",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "head:1234",
        "--rdzv-id": "job",
        "--rdzv-conf": "is_host=false",
        "--local-addr": "10.0.0.3",
    }


def test_more_nodes_without_a_meeting_point_are_refused(tools):
    done = torchrun(tools, NNODES="2")
    assert done.returncode == 2
    assert "RDZV_ENDPOINT=host:port" in done.stderr
    assert not calls(tools)


def test_torchrun_knows_the_options():
    from torch.distributed.run import get_args_parser

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    text = (REPOSITORY / "launch/torchrun.sh").read_text()
    used = {word for word in text.replace("(", " ").split() if word.startswith("--")}
    assert "--local-addr" in used
    assert used <= known


SRUN_OK = 'shift 2; SLURM_NODEID=1 "$@"'  # runs node 1's command in place
SRUN_LONG = 'touch "$RECORD_TO.started"; while [[ ! -e $RECORD_TO.stop ]]; do sleep 0.05; done; exit 143'
SCANCEL = 'touch "$RECORD_TO.stop"'
SCONTROL = "if [[ $1 == show ]]; then echo node-a; echo node-b; fi"


def slurm(tools, srun):
    write_tool(tools, "srun", srun)
    write_tool(tools, "scancel", SCANCEL)
    write_tool(tools, "scontrol", SCONTROL)
    variables = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    variables |= {"SLURM_JOB_ID": "40123", "SLURM_GPUS_ON_NODE": "4", "SHOW": "NNODES NPROC RDZV_ENDPOINT RDZV_ID"}
    return subprocess.Popen(
        ["bash", str(REPOSITORY / "launch/slurm.sbatch"), "experiment=quickstart", "x=[a, b]"],
        env=environment(tools, **variables),
        cwd=tools,
    )


def test_slurm_starts_one_launcher_per_node(tools):
    assert slurm(tools, SRUN_OK).wait(120) == 0
    by_name = {call[0]: call for call in calls(tools)}
    shared = ["NNODES=2", "NPROC=4", "RDZV_ENDPOINT=node-a:20123", "RDZV_ID=40123"]
    assert by_name["scontrol"][-3:] == ["show", "hostnames", "node-[a-b]"]
    assert by_name["srun"][1:7] == [*shared, "--kill-on-bad-exit=0", "--wait=240"]
    python = by_name["python"]
    assert python[1:5] == shared
    given, program = options([python[0], *python[5:]])
    assert program == ["-m", "moetrain", "train", "experiment=quickstart", "x=[a, b]"]
    assert given["--rdzv-endpoint"] == "node-a:20123"
    assert given["--rdzv-conf"] == "is_host=false"  # SLURM_NODEID=1
    assert "scancel" not in by_name


@pytest.mark.parametrize(("sent", "requeued", "code"), [(signal.SIGUSR1, True, 0), (signal.SIGTERM, False, 143)])
def test_slurm_passes_the_end_on_and_requeues_at_the_time_limit(tools, sent, requeued, code):
    job = slurm(tools, SRUN_LONG)
    started = tools.parent / "calls.started"
    deadline = time.monotonic() + 120
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(sent)
    try:
        assert job.wait(120) == code
    finally:
        (tools.parent / "calls.stop").touch()  # ends the stand-in srun, should scancel not have been called
    seen = [(call[0], *call[5:]) for call in calls(tools)]
    assert ("scancel", "--signal=TERM", "40123.0") in seen
    assert (("scontrol", "requeue", "40123") in seen) == requeued


def test_slurm_failure_is_not_requeued(tools):
    assert slurm(tools, "exit 3").wait(120) == 3
    assert [call[-2] for call in calls(tools) if call[0] == "scontrol"] == ["hostnames"]


def test_skypilot_run_reaches_torchrun(tools):
    task = yaml.safe_load((REPOSITORY / "launch/skypilot.yaml").read_text())
    assert task["num_nodes"] == 2
    work = tools.parent / "work"
    (work / ".venv/bin").mkdir(parents=True)
    write_tool(work / ".venv/bin", "python")
    (work / "launch").symlink_to(REPOSITORY / "launch")
    variables = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    variables |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "ARGS": "experiment=quickstart parallel.ep=8"}
    subprocess.run(["bash", "-c", task["run"]], env=environment(tools, **variables), cwd=work, check=True)
    (call,) = calls(tools)
    given, program = options(call)
    assert given["--rdzv-endpoint"] == "10.0.0.1:29500"
    assert given["--nproc-per-node"] == "8"
    assert given["--rdzv-conf"] == "is_host=true"
    assert program[2:] == ["train", "run.dir=/runs/moetrain", "experiment=quickstart", "parallel.ep=8"]


def test_this_python_is_what_a_caller_may_name(tools):
    """PYTHON chooses the interpreter: here the stand-in under another name."""
    other = write_tool(tools, "python-other")
    assert torchrun(tools, PYTHON=str(other)).returncode == 0
    assert calls(tools)[0][0] == "python-other"
    assert sys.executable not in calls(tools)[0]
