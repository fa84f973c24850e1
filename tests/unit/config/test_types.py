"""Options of plugins that are of another type than their constructors say."""

from collections.abc import Mapping

import pytest

from moetrain.config.compose import load_config
from moetrain.config.plugins import check_options, check_plugins

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.betas=0.9", "optim.betas=0.9 is not a list of 2 (float, float); nearest legal value: [0.9, 0.95]"),
        ("optim.betas=[0.9]", "optim.betas=[0.9] is not a list of 2 (float, float); nearest legal value: [0.9, 0.95]"),
        ("optim.weight_decay=[0.2]", "optim.weight_decay=[0.2] is not a number; nearest legal value: 0.2"),
        ("optim.lr=null", "optim.lr=null is not a number; nearest legal value: 0.0004"),
        ("optim.lr=fast", 'optim.lr="fast" is not a number; nearest legal value: 0.0004'),
        ("optim.decay_embeddings=1", "optim.decay_embeddings=1 is not true or false; nearest legal value: true"),
        ("optim.schedule.warmup_steps=.9", "optim.schedule.warmup_steps=0.9 is not an integer; nearest legal value: 1"),
        ("router.order=[pre]", 'router.order=["pre"] is not text; nearest legal value: "pre"'),
        ("dispatch.capacity.pad=1", "dispatch.capacity.pad=1 is not true or false; nearest legal value: false"),
        ("tracker.wandb.tags=a", 'tracker.wandb.tags="a" is not a list (of str) or null; nearest legal value: ["a"]'),
    ],
)  # fmt: skip
def test_refusals(override, message):
    config = load_config(["tracker=wandb", override])
    with pytest.raises(ValueError) as error:
        check_plugins(config)
    assert str(error.value) == message


def _plugin(unknown: "NotImported", number: float = 1.0) -> None:  # noqa: F821
    pass


def _other(what: Mapping[str, int] | None = None, either: str | int = "auto", anything=None) -> None:
    pass


def test_what_an_annotation_allows_or_does_not_say_passes():
    check_options("x", {"_target_": f"{__name__}._plugin", "unknown": 1, "number": "not known either"})
    for good in ({"what": None}, {"what": {"a": 1}}, {"either": 3}, {"either": "b"}, {"anything": [1]}):
        check_options("x", {"_target_": f"{__name__}._other", **good})
    with pytest.raises(ValueError, match=r"^x\.what=3 is not a group of keys or null; nearest legal value: null$"):
        check_options("x", {"_target_": f"{__name__}._other", "what": 3})


@pytest.mark.parametrize(
    "choice", ["optim=muon", "optim=adamw_wsd", "router=sigmoid", "router=softmax_warmup", "balance=bias"]
)
def test_the_groups_of_the_repository_pass(choice):
    check_plugins(load_config([choice, "tracker=[wandb,tensorboard]"]))
