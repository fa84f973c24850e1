"""Three rounds of scripts/chaos.sh: real torchrun in one, a kill during a save in one, forked ranks in two."""

import os

import pytest

from moetrain.testing import chaos

pytestmark = pytest.mark.e2e


@pytest.mark.timeout(1800)  # a dozen starts of four ranks on a busy machine; a hang is noticed after two minutes
def test_killed_runs_lose_nothing_and_change_nothing(tmp_path, capfd):
    seed = os.environ.get("MOETRAIN_TEST_SEED", "7")
    assert chaos.main(["--rounds", "3", "--seed", seed, "--dir", str(tmp_path)]) == 0, capfd.readouterr().out
    assert '"torchrun": ' in capfd.readouterr().out
