"""Experts are SwiGLU without biases: no family needs more, and a checkpoint or option that does is refused by name."""

import pytest

from moetrain.checkpoint.hf.families import FAMILIES
from moetrain.checkpoint.hf.translate import read
from moetrain.config.compose import load_config

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_another_activation_is_refused(name):
    with pytest.raises(ValueError, match="hidden_act='gelu' is not supported; nearest legal value: 'silu'"):
        read(FAMILIES[name], {"hidden_act": "gelu"})


@pytest.mark.parametrize("key", ["bias", "activation"])
def test_there_is_no_option_for_one(key):
    with pytest.raises(ValueError, match=f"model.moe.{key}"):
        load_config([f"model.moe.{key}=true"])
