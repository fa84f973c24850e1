import pytest
import torch

from moetrain.config.model import MoEConfig
from moetrain.observe.tape import RoutingTape

pytestmark = pytest.mark.unit


def test_a_record_that_cannot_be_made_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    tape = RoutingTape(str(tmp_path / "file" / "tape"), "", {}, MoEConfig(), 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^router\.record=.*/file/tape cannot be made"):
        tape.start(0)
