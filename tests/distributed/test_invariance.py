"""The layout changes the speed, never the numbers: every layout against a single process, in fp64, over 20 steps.

fp64 because routing is a discrete choice: in fp32 a correct program drifts apart by chance once one choice flips.
"""

import pytest
import torch

from moetrain.testing import run_ranks
from moetrain.testing.trajectory import compare, record

pytestmark = pytest.mark.distributed
BAR = 1e-9
MODEL = [
    "model.n_layers=3",
    "model.d_model=32",
    "model.d_ff=48",
    "model.attention.head_dim=8",
    "model.attention.n_heads=4",
    "model.attention.n_kv_heads=2",
    "model.attention.qk_norm=head",
    "model.moe.d_expert=24",
    "model.moe.first_k_dense=1",
    "model.moe.d_shared=16",
    "model.moe.shared_gate=true",
    "train.seq_len=64",
    "train.global_batch=8",
    "train.max_grad_norm=0.5",
    "train.steps=20",
    "optim.lr=0.003",
    "data=jsonl",
    "balance=[switch,z_loss,bias]",
    "balance.switch.coefficient=0.1",
    "balance.bias.rate=0.01",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of very different length: most rows hold several, some end inside one."""
    import json
    import random

    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    words = [f"word{i}" for i in range(50)]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(1, 60)))}) for _ in range(400)]
    path.write_text("\n".join(lines) + "\n")
    return path


def overrides(corpus, run_dir, *more, precision="fp64", micro_batch=2):
    return [
        *MODEL,
        f"data.sources.jsonl.path={corpus}",
        f"data.cache_dir={corpus.parent / 'cache'}",
        f"run.dir={run_dir}",
        f"train.precision={precision}",
        f"train.micro_batch={micro_batch}",
        *more,
    ]


LAYOUTS = {
    "dp2": (2, []),
    "ep2": (2, ["parallel.ep=2"]),
    "dp4": (4, []),
    "dp4 ep2": (4, ["parallel.ep=2"]),
    "dp4 ep4": (4, ["parallel.ep=4"]),
    "dp2x2 replicated": (4, ["parallel.dp_replicate=2"]),
    "dp2x2 replicated ep2": (4, ["parallel.dp_replicate=2", "parallel.ep=2"]),
}


@pytest.fixture(scope="module")
def single(corpus, tmp_path_factory):
    return record(overrides(corpus, tmp_path_factory.mktemp("single")), 20)


@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_steps_in_fp64(name, corpus, single, tmp_path):
    world, degrees = LAYOUTS[name]
    micro_batch = 1 if world == 4 else 2
    run, weights = run_ranks(record, world, overrides(corpus, tmp_path, *degrees, micro_batch=micro_batch), 20)[0]
    difference = compare(run, single[0])
    assert difference.loss < BAR, difference
    assert difference.norm < BAR, difference
    assert difference.gradient < BAR, difference
    for mine, theirs in zip(run, single[0]):
        loads = [key for key in theirs.row if key.startswith("moe/") and "entropy" not in key]
        assert loads
        assert all(mine.row[key] == theirs.row[key] for key in loads), "a routing choice flipped"
    for key, weight in single[1].items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=BAR)
