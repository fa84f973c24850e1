"""Three rounds of scripts/chaos.sh: real torchrun in one, a kill during a save in one, forked ranks in two."""

import pytest

from moetrain.testing import chaos

pytestmark = pytest.mark.e2e


def test_killed_runs_lose_nothing_and_change_nothing(tmp_path, capfd):
    assert chaos.main(["--rounds", "3", "--dir", str(tmp_path)]) == 0, capfd.readouterr().out
    assert '"torchrun": ' in capfd.readouterr().out
