"""Several dense models as experts of one."""

from __future__ import annotations

import pytest
import torch

from moetrain.testing.dense import random_dense
from moetrain.upcycle.command import upcycle
from moetrain.upcycle.convert import upcycled_config, upcycled_tensors
from moetrain.upcycle.copy import Copy
from moetrain.upcycle.merge import Merge

pytestmark = pytest.mark.unit


def tensors(initializer, sources):
    prepared = initializer.prepare(sources)
    made = upcycled_tensors(prepared, upcycled_config(prepared.config, initializer), initializer, 0)
    return {name: tensor.make() for name, tensor in made.items()}


@pytest.mark.parametrize(("sources", "dtype"), [(2, torch.float32), (3, torch.bfloat16)])
def test_equal_sources_are_copy(sources, dtype):
    dense = random_dense(dtype=dtype)
    merged, copied = tensors(Merge(6, 2), [dense] * sources), tensors(Copy(6, 2), [dense])
    assert merged.keys() == copied.keys()
    assert all(torch.equal(merged[name], copied[name]) for name in merged)


def test_experts_are_the_sources_and_the_rest_their_mean():
    sources = [random_dense(seed) for seed in range(3)]
    made = tensors(Merge(6, 2), sources)
    for layer in range(3):
        for expert in range(6):
            there = sources[expert % 3].weights
            gate, up, down = (
                there[f"layers.{layer}.mlp.{part}.weight"].make() for part in ("w_gate", "w_up", "w_down")
            )
            assert torch.equal(made[f"layers.{layer}.moe.experts.w_gate_up"][expert], torch.stack([gate, up]))
            assert torch.equal(made[f"layers.{layer}.moe.experts.w_down"][expert], down)
        name = f"layers.{layer}.attention.w_q.weight"
        want = torch.stack([source.weights[name].make() for source in sources]).mean(0)
        torch.testing.assert_close(made[name], want, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Merge(4, 2).prepare([random_dense(), random_dense(d_ff=64)]), r"model\.d_ff=64, but the first has 48"),
        (
            lambda: Merge(4, 2).prepare([random_dense(), random_dense(attention__rope__theta=5.0)]),
            r"number 2 has model\.attention\.rope\.theta=5\.0",
        ),
        (lambda: Merge(4, 2).prepare([random_dense()] * 3), "experts=4 .* 3 sources; nearest legal value: 3"),
        (lambda: Copy(4, 2).prepare([random_dense()] * 2), "names 2 models, .* nearest legal value: 1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_sources_of_the_command(tmp_path):
    options = {"upcycle": "merge", "experts": "4", "top_k": "2", "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        upcycle({**options, "source": f"[{tmp_path / 'nowhere'},{tmp_path / 'there'}]"})
