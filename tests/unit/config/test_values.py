"""NaN, infinity, wrong signs, and one value where keys or a list belong: refused before ranks, by key."""

import math
from copy import deepcopy
from dataclasses import asdict

import pytest

from moetrain.config.compose import load_config
from moetrain.config.inherit import flat
from moetrain.config.plugins import check_plugins
from moetrain.config.validate import validate
from moetrain.config.values import check_values
from moetrain.train import rehearse, run_config

pytestmark = pytest.mark.unit
LLAMA3 = ("model.attention.rope.scaling=llama3", "model.attention.rope.factor=8")


def _start(overrides):
    config = run_config(overrides)
    validate(config, 1)
    check_plugins(config)
    rehearse(config)


@pytest.mark.parametrize("group", ["balance=bias", "router=forced", "optim=muon"])
def test_every_float_must_be_finite(group, monkeypatch):
    """Of the whole tree, so that a key that is added is checked too."""
    monkeypatch.setattr("moetrain.config.values.usual", lambda key: "the usual")
    composed = load_config([group])
    check_values(composed)
    keys = [key for key, value in flat(asdict(composed)).items() if isinstance(value, float)]
    assert len(keys) > 20
    for key in keys:
        *path, last = key.split(".")
        for bad in (math.nan, math.inf, -math.inf):
            config = node = deepcopy(composed)
            for part in path:
                node = node[part] if isinstance(node, dict) else getattr(node, part)
            if isinstance(node, dict):
                node[last] = bad
            else:
                setattr(node, last, bad)
            with pytest.raises(ValueError) as error:
                check_values(config)
            assert str(error.value).startswith(f"{key}={bad} is not a finite number; nearest legal value: ")


@pytest.mark.parametrize(
    ("overrides", "message", "nearest"),
    [
        (["balance.switch.coefficient=nan"], "balance.switch.coefficient=nan", "0.01"),
        (["optim.betas=[0.9,nan]"], "optim.betas=nan", "[0.9, 0.95]"),
        (["train.max_grad_norm=inf"], "train.max_grad_norm=inf", "0"),
        (["balance.switch.coefficient=-0.01"], "balance.switch.coefficient is -0.01", "0"),
        (["balance.z_loss.coefficient=-1"], "balance.z_loss.coefficient is -1", "0"),
        (["balance=bias", "balance.bias.rate=-0.1"], "balance.bias.rate is -0.1", "0"),
        (["balance.switch.scope=batch"], "balance.switch.scope='batch'", "(of sequence, micro_batch, global_batch)"),
        (["router.scale=0"], "router.scale is 0", "1.0"),
        (["router=sigmoid", "router.scale=-2"], "router.scale is -2", "1.0"),
        (["router=forced", "router.exponent=-1"], "router.exponent is -1", "0"),
        (["optim.lr=-1"], "optim.lr is -1", "0"),
        (["optim.eps=0"], "optim.eps is 0", "1e-08"),
        (["optim.schedule.min_ratio=2"], "optim.schedule.min_ratio is 2", "1"),
        (
            [*LLAMA3, "model.attention.rope.low_freq_factor=4"],
            "model.attention.rope.low_freq_factor=4.0",
            "1.0 and 4.0",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_make_no_sense(overrides, message, nearest):
    with pytest.raises(ValueError) as error:
        _start(overrides)
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(nearest)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("balance.switch=0.05", "balance.switch.coefficient=0.05"),
        ("balance.switch=null", "~balance.switch"),
        ("dispatch.capacity=1.25", "dispatch.capacity.factor=1.25"),
        ("dispatch.placement=100", "dispatch.placement.every=100"),
        ("router.rounding=8", "router.rounding.tile=8"),
        ("optim.schedule=cosine", "optim.schedule.warmup_steps=..."),
    ],
)
def test_one_value_in_place_of_keys(override, nearest):
    key = override.split("=")[0]
    with pytest.raises(ValueError) as error:
        _start([override])
    assert str(error.value).startswith(f"{key}=")
    assert str(error.value).endswith(f"is one value, but has keys of its own; nearest legal value: {nearest}")


def test_the_path_to_start_from_is_one():
    with pytest.raises(ValueError, match=r"^init\.from=\['a'\] is not one path; nearest legal value: a$"):
        _start(["init.from=[a]"])
