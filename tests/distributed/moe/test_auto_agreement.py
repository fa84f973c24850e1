"""experts=auto on several ranks: rank 0 decides, everyone computes with its choice, and a failure reaches everyone."""

import pytest
import torch
import torch.distributed as dist

from moetrain.config.compose import load_config
from moetrain.config.validate import validate
from moetrain.model.build import build_model
from moetrain.moe.layer import MoELayer
from moetrain.parallel.experts import settle_experts, workload
from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL

pytestmark = pytest.mark.distributed


class Fake:
    """Chooses by rank, so that only rank 0's answer makes ranks agree."""

    name = "none"

    def decide(self, load, device, timed):
        assert dist.get_rank() == 0, "only rank 0 may measure"
        if load.d_model != 32:
            raise RuntimeError("nothing is correct")
        return "b", f"b for {load.tokens} tokens, timed {timed}"

    def use(self, name):
        self.name = name


def settle(overrides):
    config = load_config([*SMALL_MODEL, "parallel.ep=2", *overrides])
    layout = validate(config, 2)
    with torch.device("meta"):
        model = build_model(config, "cpu")
    fake = Fake()
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
        layer.experts.backend = fake
    return settle_experts(model, config, layout, torch.device("cpu")), fake.name


def test_every_rank_takes_rank_0s_choice():
    # Each of two data ranks holds 4 rows of 64 tokens, and the tokens of both meet at the experts.
    assert run_ranks(settle, 2, []) == [("b for 512 tokens, timed True", "b")] * 2
    assert run_ranks(settle, 2, ["run.deterministic=true"])[1] == ("b for 512 tokens, timed False", "b")


def test_no_correct_backend_stops_every_rank():
    with pytest.raises(Exception, match="nothing is correct"):
        run_ranks(settle, 2, ["model.d_model=64"])


def test_a_rank_of_every_axis_counts_what_it_is_given():
    config = load_config([*SMALL_MODEL, "parallel.tp=2", "parallel.cp=2", "parallel.ep=4", "train.micro_batch=2"])
    load = workload(config, validate(config, 8))
    assert (load.tokens, load.local_experts, load.d_expert) == (2 * 64 // 4 * 4, 2, 24)
    config = load_config([*SMALL_MODEL, "parallel.etp=2"])
    load = workload(config, validate(config, 2))
    assert (load.tokens, load.local_experts, load.d_expert) == (4 * 64 * 2, 8, 12)
