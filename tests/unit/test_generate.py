"""A sample of what a layout trained, in one process."""

import pytest

from moetrain.config.compose import load_config
from moetrain.config.validate import validate
from moetrain.generate import alone

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "dispatch", ["dispatch.placement.every=10", "dispatch=two_level", "dispatch.capacity.factor=1"]
)
def test_options_for_several_ranks_do_not_stand_in_the_way(dispatch):
    config = load_config([dispatch, "parallel.ep=2", "train.global_batch=8"])
    validate(config, 2)
    validate(alone(config), 1)
    assert alone(config).dispatch == load_config([]).dispatch
