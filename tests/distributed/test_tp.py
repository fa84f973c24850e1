"""Tensor and sequence parallelism against one process: dense layers, embedding, head, MoE layers on row stretches."""

import pytest
import torch

from moetrain.mesh.build import Meshes
from moetrain.moe.balance import switch
from moetrain.moe.experts.pieces import CallPieces
from moetrain.parallel import tp
from moetrain.testing import RankFailure, run_ranks
from moetrain.testing.small import SMALL_MODEL
from moetrain.testing.trajectory import flips, new_trainer, record, whole, worst

pytestmark = pytest.mark.distributed
BAR = 1e-9
DENSE = [
    "model.moe.n_experts=0",
    "model.moe.d_shared=0",
    "model.moe.shared_gate=false",
    "model.n_layers=2",
]
MLA = [
    "model.attention.kind=mla",
    "model.attention.qk_norm=none",
    "model.attention.q_lora_rank=12",
    "model.attention.kv_lora_rank=16",
    "model.attention.qk_nope_head_dim=6",
    "model.attention.qk_rope_head_dim=4",
    "model.attention.v_head_dim=10",
]
MODELS = {
    "gqa": DENSE,
    "gqa biases tied": [
        *DENSE,
        "model.attention.qkv_bias=true",
        "model.attention.out_bias=true",
        "model.tie_embeddings=true",
    ],
    "gqa full norm": [*DENSE, "model.attention.qk_norm=full"],
    "mla": [*DENSE, *MLA],
    "mla direct queries tied": [*DENSE, *MLA, "model.attention.q_lora_rank=0", "model.tie_embeddings=true"],
    "moe": [],
    "moe four heads": ["model.attention.n_kv_heads=4", "model.attention.qk_norm=none"],
    "moe micro_batch scope": ["balance.switch.scope=micro_batch", "model.attention.qk_norm=full"],
}
LAYOUTS = {  # model, world, degrees, steps: 20 for what combines most, to see whether errors grow
    "dense tp2": ("gqa", 2, ["parallel.tp=2"], 4),
    "dense tp2 biases tied": ("gqa biases tied", 2, ["parallel.tp=2"], 4),
    "dense tp2 dp2 biases tied": ("gqa biases tied", 4, ["parallel.tp=2"], 4),
    "dense tp2 full norm": ("gqa full norm", 2, ["parallel.tp=2"], 4),
    "dense tp2 mla": ("mla", 2, ["parallel.tp=2"], 4),
    "dense tp2 dp2 mla tied": ("mla direct queries tied", 4, ["parallel.tp=2"], 4),
    "tp2": ("moe", 2, ["parallel.tp=2"], 5),
    "tp2 ep2": ("moe", 2, ["parallel.tp=2", "parallel.ep=2"], 5),
    "tp2 dp2": ("moe", 4, ["parallel.tp=2"], 5),
    "tp2 dp2 ep4": ("moe", 4, ["parallel.tp=2", "parallel.ep=4"], 5),
    "tp2 dp2 etp2 ep2": ("moe", 4, ["parallel.tp=2", "parallel.etp=2", "parallel.ep=2"], 20),
    "tp2 dp2 etp4": ("moe", 4, ["parallel.tp=2", "parallel.etp=4"], 5),
    "tp2 dp2 replicated ep2": ("moe", 4, ["parallel.tp=2", "parallel.ep=2", "parallel.dp_replicate=2"], 5),
    "tp4 etp2 ep2": ("moe four heads", 4, ["parallel.tp=4", "parallel.etp=2", "parallel.ep=2"], 5),
    "tp2 dp2 micro_batch scope": ("moe micro_batch scope", 4, ["parallel.tp=2", "parallel.ep=2"], 3),
}


def overrides(documents, run_dir, *more, dp=1):
    options = [f"run.dir={run_dir}", "train.precision=fp64", f"train.micro_batch={4 // dp}"]
    return [*SMALL_MODEL, *documents, *options, *more]


@pytest.fixture(scope="module")
def single(documents, tmp_path_factory):
    """model name -> its run in one process, made when first asked for."""
    runs = {}

    def of(model):
        if model not in runs:
            steps = max(steps for name, _, _, steps in LAYOUTS.values() if name == model)
            options = overrides(documents, tmp_path_factory.mktemp("single"), *MODELS[model])
            runs[model] = run_ranks(record, 1, options, steps)[0][0]
        return runs[model]

    return of


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name, documents, single, tmp_path):
    model, world, degrees, steps = LAYOUTS[name]
    dp = world // int(degrees[0].split("=")[1])
    options = overrides(documents, tmp_path, *MODELS[model], *degrees, dp=dp)
    ranks = run_ranks(record, world, options, steps)
    assert worst(ranks[0][0], single(model)) < BAR
    for run, _ in ranks[1:]:
        assert worst(run, ranks[0][0]) == 0, "ranks report different numbers"
    if model.startswith("moe"):
        assert flips(ranks[0][0], single(model)) == 0


def break_it(fault, monkeypatch):
    plain = {"gather": tp.gather_shards, "calls": CallPieces._gradients, "replicated": tp._replicated}
    if fault == "router not summed":
        router = (8, 32)  # [E, D], the only parameter of this shape
        monkeypatch.setattr(tp, "_replicated", lambda p: plain["replicated"](p) and tuple(p.shape) != router)
    elif fault == "experts doubled":
        monkeypatch.setattr(CallPieces, "_gradients", lambda work, piece, dy: plain["calls"](work, piece, 2 * dy))
    elif fault == "swapped source rank":
        monkeypatch.setattr(tp, "gather_shards", lambda x, dim, group: plain["gather"](x, dim, group).roll(32, dim))
    elif fault == "rows balanced in parts":
        monkeypatch.setattr(switch, "all_reduce_sum", lambda x, group: x.clone())
    elif fault == "loss counted twice":
        monkeypatch.setattr(Meshes, "tp_rank", 0)


FAULTS = ["router not summed", "experts doubled", "swapped source rank", "rows balanced in parts", "loss counted twice"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_reduction_is_noticed(fault, documents, single, tmp_path, monkeypatch):
    reference = single("moe")
    break_it(fault, monkeypatch)
    options = overrides(documents, tmp_path, "parallel.tp=2", "parallel.ep=2")
    try:
        run, _ = run_ranks(record, 2, options, 2)[0]
    except RankFailure as error:  # the recorder notices by itself that ranks have drifted apart
        if "ranks differ" in str(error):
            return
        raise
    assert worst(run, reference) > 1e-6, f"{fault} went unnoticed"


def train(options, steps):
    """Steps done before and after, weights, and optimizer state, all whole."""
    trainer = new_trainer([*options, f"train.steps={steps}"])
    first = trainer.step
    trainer.fit()
    state = {name: whole(p) for name, p in trainer.model.named_parameters()}
    for name, p in trainer.model.named_parameters():
        state |= {f"{name}.{slot}": whole(value) for slot, value in trainer.optimizer.state[p].items()}
    trainer.close()
    return first, state


def test_a_run_moves_between_layouts(documents, single, tmp_path):
    """Two steps under tp2 etp2, two in one process, two under tp2 ep4: the weights of six steps in one process."""
    more = ["train.eval_every=2", "train.eval_batches=1", "run.log_samples=true", "optim.schedule.warmup_steps=100"]
    straight = run_ranks(train, 1, [*overrides(documents, tmp_path / "straight"), *more], 6)[0][1]
    layouts = [(4, ["parallel.tp=2", "parallel.etp=2"]), (1, []), (4, ["parallel.tp=2", "parallel.ep=4"])]
    for index, (world, degrees) in enumerate(layouts):
        options = overrides(documents, tmp_path / "moved", *more, *degrees, dp=max(1, world // 2))
        first, moved = run_ranks(train, world, options, 2 * index + 2)[0]
        assert first == 2 * index
    assert moved.keys() == straight.keys()
    for name, value in straight.items():
        torch.testing.assert_close(moved[name], value, rtol=0, atol=1e-9, msg=name)
    assert (tmp_path / "moved/samples.jsonl").read_text().count("\n") == 2 * 2 + 2 * 1 + 2 * 2  # each dp rank once
