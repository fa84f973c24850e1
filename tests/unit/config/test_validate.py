"""Refusals: each names the key and the nearest legal value, without ranks, GPUs, or torch.distributed."""

import pytest

from moetrain.config.compose import load_config
from moetrain.config.validate import validate

pytestmark = pytest.mark.unit

REFUSED = [
    # world, overrides, key, nearest legal value
    (2, ["parallel.ep=3"], "parallel.ep=3", "2"),
    (6, ["parallel.ep=3", "train.global_batch=12"], "parallel.ep=3", "2"),
    (8, ["parallel.ep=16"], "parallel.ep=16", "8"),
    (8, ["parallel.ep=8", "model.moe.n_experts=12", "parallel.etp=1"], "parallel.ep=8", "4"),
    (4, ["parallel.ep=0"], "parallel.ep=0", "1"),
    (4, ["parallel.dp_replicate=3"], "parallel.dp_replicate=3", "2"),
    (4, ["parallel.tp=2"], "parallel.tp=2", "1"),
    (4, ["parallel.cp=2"], "parallel.cp=2", "1"),
    (8, ["parallel.pp=8"], "parallel.pp=8", "4"),
    (4, ["parallel.pp=4", "parallel.schedule=interleaved"], "parallel.pp=4", "2"),
    (4, ["parallel.pp=3"], "parallel.pp=3", "2"),
    (2, ["parallel.pp=2"], "train.micro_batch=0", "8"),
    (2, ["parallel.pp=2", "train.micro_batch=4", "parallel.schedule=gpipe"], "parallel.schedule='gpipe'", "dualpipev"),
    (2, ["parallel.pp=2", "train.micro_batch=8", "parallel.schedule=dualpipev"], "train.micro_batch=8", "4"),
    (2, ["parallel.pp=2", "train.global_batch=1"], "train.global_batch=1", "2"),
    (
        2,
        ["parallel.pp=2", "train.global_batch=5", "train.micro_batch=1", "parallel.schedule=interleaved"],
        "train.micro_batch=1",
        "5",
    ),
    (2, ["parallel.pp=2", "parallel.pp_layers=[1,2]", "train.micro_batch=4"], "parallel.pp_layers=[1, 2]", "[2, 2]"),
    (2, ["parallel.pp=2", "parallel.pp_layers=[4]", "train.micro_batch=4"], "parallel.pp_layers=[4]", "[2, 2]"),
    (2, ["parallel.pp=2", "parallel.pp_layers=[4,0]", "train.micro_batch=4"], "parallel.pp_layers=[4, 0]", "[2, 2]"),
    (
        2,
        ["parallel.pp=2", "parallel.pp_layers=[2,2]", "parallel.schedule=zbv", "train.micro_batch=4"],
        "parallel.pp_layers=[2, 2]",
        "[1, 1, 1, 1]",
    ),
    (1, ["parallel.pp_layers=[4]"], "parallel.pp_layers=[4]", "null"),
    (2, ["parallel.pp=2", "parallel.reshard_after_forward=true"], "parallel.reshard_after_forward=true", "false"),
    (2, ["parallel.pp=2", "parallel.schedule=zbv", "parallel.recompute=full"], "parallel.recompute=full", "none"),
    (4, ["parallel.etp=2"], "parallel.etp=2", "1"),
    (4, ["parallel.tp=3"], "parallel.tp=3", "2"),
    (1, ["parallel.recompute=ful"], "parallel.recompute='ful'", "full"),
    (1, ["parallel.schedule=zbv"], "parallel.schedule=zbv", "1f1b"),
    (3, [], "train.global_batch=16", "15"),
    (32, [], "train.global_batch=16", "32"),
    (2, ["train.micro_batch=3"], "train.micro_batch=3", "2"),
    (2, ["train.micro_batch=16"], "train.micro_batch=16", "8"),
    (1, ["train.micro_batch=-1"], "train.micro_batch=-1", "0"),
    (1, ["train.steps=0"], "train.steps=0", "1"),
    (1, ["train.seq_len=0"], "train.seq_len=0", "1"),
    (1, ["train.precision=fp8"], "train.precision='fp8'", "fp64"),
    (1, ["train.precision=bf32"], "train.precision='bf32'", "fp32"),
    (1, ["train.eval_every=-1"], "train.eval_every=-1", "0"),
    (1, ["checkpoint.keep=-1"], "checkpoint.keep=-1", "0"),
    (1, ["model.moe.top_k=9"], "model.moe.top_k=9", "8"),
    (1, ["model.attention.n_kv_heads=3"], "model.attention.n_kv_heads=3", "2"),
    (4, ["model.moe.d_expert=30"], "model.moe.d_expert=30", "32"),
    (2, ["model.moe.n_experts=0", "parallel.ep=2"], "parallel.ep=2", "1"),
    (1, ["router.record=a", "router.replay=a"], "router.record=a", '""'),
    (1, ["router.replay=a", "model.moe.n_experts=0"], "router.replay=a", '""'),
    (1, ["data.documents=stopp"], "data.documents='stopp'", "stop"),
]


@pytest.mark.parametrize(("world", "overrides", "key", "nearest"), REFUSED, ids=lambda v: str(v))
def test_refusals(world, overrides, key, nearest):
    config = load_config(overrides)
    with pytest.raises(ValueError) as error:
        validate(config, world)
    message = str(error.value)
    assert key in message
    assert message.rstrip().endswith(nearest), message


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_default_configuration_runs_on_any_power_of_two(world):
    for ep in (1, world):
        assert validate(load_config([f"parallel.ep={ep}"]), world).ep == ep
