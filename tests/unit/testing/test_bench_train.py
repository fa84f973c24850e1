"""The plan of scripts/bench_train.sh: every command of ours is a configuration that its ranks would accept."""

import pytest

from moetrain.config.compose import load_config
from moetrain.config.validate import validate
from moetrain.testing.bench_train import ROUTINGS, SEQUENCES, SHAPES, STACKS, cases, main

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
            assert bool(config.balance) == (case.routing == "natural")
            assert config.router.get("distribution") == (None if case.routing == "natural" else case.routing)


def test_the_dry_run_prints_a_command_a_row(capsys):
    assert main(["--dry-run", "--gpus", "2", "--only", "balanced"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("torchrun ") for line in lines)
