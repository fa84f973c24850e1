"""The plan of scripts/bench_train.sh: every command of ours is a configuration that its ranks would accept."""

import pytest

from moetrain.config.compose import load_config
from moetrain.config.validate import validate
from moetrain.testing import bench_train
from moetrain.testing.bench_train import MEGATRON, ROUTINGS, SEQUENCES, SHAPES, STACKS, Case, cases, main

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_every_row_is_a_legal_configuration(gpus, tmp_path):
    rows = cases(gpus, steps=12, natural_steps=500)
    assert len(rows) == len(SHAPES) * len(ROUTINGS) * len(STACKS)
    for case in rows:
        assert case.steps == (512 if case.routing == "natural" else 12)
        command = case.command(tmp_path)
        config = load_config(command[command.index(case.overrides[0]) :])
        assert config.train.global_batch * config.train.seq_len == SEQUENCES * 4096 * gpus
        assert config.train.precision == "bf16"
        assert config.parallel.recompute == "none"
        if case.stack == "moetrain":
            assert validate(config, gpus).ep == gpus
        if case.stack in ("moetrain", MEGATRON):  # the stacks with expert parallelism
            assert bool(config.balance) == (case.routing == "natural")
        if case.stack == "moetrain":
            assert config.router.get("distribution") == (None if case.routing == "natural" else case.routing)


def test_the_dry_run_prints_a_command_a_row(capsys):
    assert main(["--dry-run", "--gpus", "2", "--only", "balanced"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("torchrun ") for line in lines)


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        ("0.16.1", ""),
        ("0.15.0", "megatron-core 0.15.0 is installed, not 0.16.1"),
        (None, "megatron-core 0.16.1 is not installed"),
    ],
)
def test_a_row_says_why_megatron_is_absent(installed, reason, monkeypatch, capsys):
    def version(name):
        if installed is None:
            raise bench_train.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(bench_train.metadata, "version", version)
    monkeypatch.setattr(bench_train.subprocess, "run", lambda *args, **kwargs: pytest.fail("an absent row ran"))
    row = Case("bench_qwen3_12l", "balanced", MEGATRON, gpus=2, steps=4)
    assert row.absent == reason
    if reason:
        assert bench_train.measure(row, rate=1.0) == 0
        assert f"| absent: {reason} |" in capsys.readouterr().out
    assert not Case("bench_qwen3_12l", "balanced", "moetrain", gpus=2, steps=4).absent
