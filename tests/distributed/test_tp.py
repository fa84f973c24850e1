"""Tensor and sequence parallelism against one process: dense layers, embedding, head, MoE layers on row stretches."""

import pytest

from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL, write_documents
from moetrain.testing.trajectory import compare, record

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
    "moe micro_batch scope": ["balance.switch.scope=micro_batch", "model.attention.qk_norm=full"],
}
LAYOUTS = {  # model, world, degrees, steps
    "dense tp2": ("gqa", 2, ["parallel.tp=2"], 20),
    "dense tp2 biases tied": ("gqa biases tied", 2, ["parallel.tp=2"], 4),
    "dense tp2 dp2 biases tied": ("gqa biases tied", 4, ["parallel.tp=2"], 4),
    "dense tp2 full norm": ("gqa full norm", 2, ["parallel.tp=2"], 4),
    "dense tp2 mla": ("mla", 2, ["parallel.tp=2"], 4),
    "dense tp2 dp2 mla tied": ("mla direct queries tied", 4, ["parallel.tp=2"], 4),
    "tp2": ("moe", 2, ["parallel.tp=2"], 20),
    "tp2 ep2": ("moe", 2, ["parallel.tp=2", "parallel.ep=2"], 5),
    "tp2 dp2": ("moe", 4, ["parallel.tp=2"], 5),
    "tp2 dp2 ep2": ("moe", 4, ["parallel.tp=2", "parallel.ep=2"], 5),
    "tp2 dp2 ep4": ("moe", 4, ["parallel.tp=2", "parallel.ep=4"], 20),
    "tp2 dp2 etp2": ("moe", 4, ["parallel.tp=2", "parallel.etp=2"], 5),
    "tp2 dp2 etp2 ep2": ("moe", 4, ["parallel.tp=2", "parallel.etp=2", "parallel.ep=2"], 20),
    "tp2 dp2 etp4": ("moe", 4, ["parallel.tp=2", "parallel.etp=4"], 5),
    "tp2 dp2 replicated ep2": ("moe", 4, ["parallel.tp=2", "parallel.ep=2", "parallel.dp_replicate=2"], 5),
    "tp2 dp2 micro_batch scope": ("moe micro_batch scope", 4, ["parallel.tp=2", "parallel.ep=2"], 3),
}


def overrides(documents, run_dir, *more, dp=1):
    options = [f"run.dir={run_dir}", "train.precision=fp64", f"train.micro_batch={4 // dp}"]
    return [*SMALL_MODEL, *documents, *options, *more]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"))


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


def worst(run, single):
    difference = compare(run, single[: len(run)])
    print(difference)
    return max(difference.loss, difference.norm, difference.gradient)


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name, documents, single, tmp_path):
    model, world, degrees, steps = LAYOUTS[name]
    tp = int(degrees[0].split("=")[1])
    options = overrides(documents, tmp_path, *MODELS[model], *degrees, dp=world // tp)
    ranks = run_ranks(record, world, options, steps)
    assert worst(ranks[0][0], single(model)) < BAR
    for run, _ in ranks[1:]:
        assert worst(run, ranks[0][0]) == 0, "ranks report different numbers"
    for mine, theirs in zip(ranks[0][0], single(model)):
        loads = [key for key in theirs.row if key.startswith("moe/") and "entropy" not in key]
        assert all(mine.row[key] == theirs.row[key] for key in loads), "a routing choice flipped"
