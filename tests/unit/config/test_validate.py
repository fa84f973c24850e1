"""Refusals: each names the key and the nearest legal value, without ranks, GPUs, or torch.distributed."""

import subprocess
import sys

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
    (8, ["parallel.tp=8"], "parallel.tp=8", "4"),
    (4, ["parallel.tp=4", "model.attention.n_kv_heads=2"], "parallel.tp=4", "2"),
    (4, ["parallel.tp=2", "model.attention.n_kv_heads=1"], "parallel.tp=2", "1"),
    (2, ["parallel.tp=2", "model.vocab_size=263"], "model.vocab_size=263", "264"),
    (2, ["parallel.tp=2", "train.seq_len=255"], "train.seq_len=255", "256"),
    (2, ["parallel.tp=2", "model.moe.first_k_dense=1", "model.d_ff=511"], "model.d_ff=511", "512"),
    (8, ["parallel.tp=2", "model.d_model=130"], "model.d_model=130", "128"),
    (4, ["parallel.cp=3"], "parallel.cp=3", "2"),
    (2, ["parallel.cp=2", "train.seq_len=255"], "train.seq_len=255", "256"),
    (4, ["parallel.cp=4", "train.seq_len=12"], "train.seq_len=12", "16"),
    (4, ["parallel.cp=4", "train.seq_len=1"], "train.seq_len=1", "8"),
    (1, ["parallel.cp_method=rings"], "parallel.cp_method='rings'", "ring"),
    (2, ["parallel.cp=2", "parallel.cp_method=gather"], "parallel.cp_method='gather'", "allgather"),
    (
        4,
        ["parallel.cp=4", "parallel.cp_method=ulysses", "model.attention.n_heads=6", "model.attention.n_kv_heads=2"],
        "parallel.cp_method=ulysses",
        "allgather",
    ),
    (4, ["parallel.etp=3"], "parallel.etp=3", "2"),
    (2, ["dispatch.placement.every=5"], "dispatch.placement.every=5", "0"),
    (8, ["dispatch.placement.every=5", "parallel.ep=8"], "dispatch.placement.every=5", "0"),
    (1, ["dispatch.placement.every=5", "model.moe.n_experts=0"], "dispatch.placement.every=5", "0"),
    (4, ["parallel.etp=4", "model.moe.d_expert=30"], "model.moe.d_expert=30", "32"),
    (8, ["parallel.etp=2", "model.d_model=130", "model.moe.d_expert=30"], "model.d_model=130", "128"),
    (4, ["parallel.etp=2", "model.moe.n_experts=0"], "parallel.etp=2", "1"),
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
    (2, ["parallel.tp=2", "parallel.compile=true"], "parallel.compile=true", "false"),
    (
        2,
        ["parallel.pp=2", "parallel.schedule=zbv", "parallel.compile=true", "train.micro_batch=4"],
        "parallel.compile=true",
        "false",
    ),
    (4, ["parallel.tp=3"], "parallel.tp=3", "2"),
    (1, ["checkpoint.keep_best=-1"], "checkpoint.keep_best=-1", "0"),
    (1, ["checkpoint.keep_best=1"], "checkpoint.keep_best=1", "0"),
    (1, ["checkpoint.keep_best=1", "checkpoint.every=4", "train.eval_every=3"], "train.eval_every=3", "2"),
    (1, ["checkpoint.keep_every=25", "checkpoint.every=10"], "checkpoint.keep_every=25", "20"),
    (1, ["init.allow=head.weight"], "init.allow='head.weight'", "['head.weight']"),
    (1, ["parallel.recompute=ful"], "parallel.recompute='ful'", "full"),
    (1, ["parallel.schedule=zbv"], "parallel.schedule=zbv", "1f1b"),
    (3, [], "train.global_batch=16", "15"),
    (32, [], "train.global_batch=16", "32"),
    (2, ["train.micro_batch=3"], "train.micro_batch=3", "2"),
    (2, ["train.micro_batch=16"], "train.micro_batch=16", "8"),
    (1, ["train.micro_batch=-1"], "train.micro_batch=-1", "0"),
    (1, ["train.steps=0"], "train.steps=0", "1"),
    (1, ["train.seq_len=0"], "train.seq_len=0", "1"),
    (1, ["train.precision=fp8"], "train.precision='fp8'", "fp32"),
    (1, ["train.precision=fp16"], "train.precision='fp16'", "bf16"),
    (1, ['run.dir="~/runs"'], "run.dir=~/runs", "/runs"),
    (1, ["train.precision=bf32"], "train.precision='bf32'", "fp32"),
    (1, ["train.eval_every=-1"], "train.eval_every=-1", "0"),
    (1, ["checkpoint.keep=-1"], "checkpoint.keep=-1", "0"),
    (1, ["checkpoint.when_busy=skipp"], "checkpoint.when_busy='skipp'", "skip"),
    (1, ["checkpoint.grace_s=0"], "checkpoint.grace_s=0", "1"),
    (1, ["run.hang_timeout_s=-1"], "run.hang_timeout_s=-1", "0"),
    (1, ["train.on_bad_step=roll_back"], "train.on_bad_step='roll_back'", "rollback"),
    (1, ["train.on_bad_step=rollback"], "checkpoint.every=0", "1"),
    (1, ["train.max_bad_steps=-1"], "train.max_bad_steps=-1", "0"),
    (1, ["train.max_loss=-2"], "train.max_loss=-2", "0"),
    (1, ["model.moe.top_k=9"], "model.moe.top_k=9", "8"),
    (1, ["model.attention.n_kv_heads=3"], "model.attention.n_kv_heads=3", "2"),
    (4, ["model.moe.d_expert=30"], "model.moe.d_expert=30", "32"),
    (2, ["model.moe.n_experts=0", "parallel.ep=2"], "parallel.ep=2", "1"),
    (1, ["router.kernels=triton", "train.precision=fp64"], "router.kernels=triton", "torch"),
    (1, ["router.rounding.tile=512"], "router.rounding.tile=512", "256"),
    (1, ["router.rounding.tile=200"], "router.rounding.tile=200", "128"),
    (1, ["router.rounding.tile=80", "router.rounding.mode=down"], "router.rounding.tile=80", "64"),
    (1, ["router.rounding.tile=64", "router.record=a"], "router.record", "tile=0"),
    (1, ["router.top_k=4"], "router.top_k=4", "2"),
    (1, ["train.max_grad_norm=nan"], "train.max_grad_norm=nan", "0"),
    (1, ["run.seed=-1"], "run.seed=-1", "0"),
    (1, ["train.max_loss=nan"], "train.max_loss=nan", "0"),
    (1, ["router.record=a", "router.replay=a"], "router.record=a", '""'),
    (1, ["router.replay=a", "model.moe.n_experts=0"], "router.replay=a", '""'),
    (1, ["router.replay=nowhere"], "router.replay=nowhere", '""'),
    (1, ["run.dir="], 'run.dir=""', "runs/tiny"),
    (1, ["checkpoint.keep_every=50"], "checkpoint.every=0", "50"),
    (1, ["checkpoint.keep_best=2", "train.eval_every=20"], "checkpoint.every=0", "20"),
    (1, ["dispatch.capacity.factor=1.2", "model.moe.n_experts=0"], "dispatch.capacity.factor=1.2", "0"),
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


def test_v_schedules_need_a_torch_whose_split_backward_is_right(monkeypatch):
    monkeypatch.setattr("moetrain.config.pipeline.version", lambda package: "2.11.0+cu130")
    overrides = ["parallel.pp=2", "parallel.schedule=zbv", "train.micro_batch=4"]
    with pytest.raises(ValueError, match=r"parallel\.schedule=zbv needs torch 2\.13.*nearest legal value: interleaved"):
        validate(load_config(overrides), 2)


def test_an_odd_row_is_refused_only_where_it_is_cut():
    assert validate(load_config(["train.seq_len=255"]), 2).cp == 1


@pytest.mark.parametrize("method", ["allgather", "ring", "ulysses"])
def test_the_tiny_preset_runs_under_every_method_of_context_parallelism(method):
    for cp in (2, 4):
        assert validate(load_config([f"parallel.cp={cp}", f"parallel.cp_method={method}"]), 4).cp == cp


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_default_configuration_runs_on_any_power_of_two(world):
    for ep in (1, world):
        assert validate(load_config([f"parallel.ep={ep}"]), world).ep == ep


def test_a_refusal_needs_no_torch():
    """So that it takes a second on a login node, whatever the machine."""
    code = (
        "import sys; from moetrain.cli import main; code = main(['train', 'parallel.ep=3']);"
        "sys.exit(1 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "parallel.ep=3" in done.stderr
