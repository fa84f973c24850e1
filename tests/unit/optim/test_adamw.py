"""Decay groups, eager state, and updates against torch's plain loop."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from moetrain.optim import adamw
from moetrain.optim.schedule import WarmupCosine, WarmupStableDecay

pytestmark = pytest.mark.unit

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm((2, 4))  # a two-dimensional norm weight: dimensions alone would decay it
        self.linear = nn.Linear(4, 3)
        self.w_EFD = nn.Parameter(torch.randn(2, 3, 4))
        self.expert_bias = nn.Parameter(torch.zeros(2, 3))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def _decaying(optimizer, model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}


def _build(model, **options):
    return adamw.build(model.named_parameters(), lr=0.1, **options)


def test_groups():
    model = _Model()
    assert _decaying(_build(model), model) == {"embed.weight", "linear.weight", "w_EFD"}
    assert _decaying(_build(model, decay_embeddings=False), model) == {"linear.weight", "w_EFD"}
    held = [p for group in _build(model).param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == 7  # all but the frozen one, once each


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_updates_equal_a_plain_adamw_and_state_exists_from_the_start(device):
    torch.manual_seed(0)
    model = _Model().double().to(device)
    reference = _Model().double().to(device)
    reference.load_state_dict(model.state_dict())
    optimizer = _build(model)
    assert {k for s in optimizer.state.values() for k in s} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(optimizer.state) == 7
    decays = _decaying(optimizer, model)
    plain = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": 0.1 if name in decays else 0.0}
            for name, p in reference.named_parameters()
            if p.requires_grad
        ],
        lr=0.1,
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    for _ in range(3):
        for p, q in zip(model.parameters(), reference.parameters()):
            if p.requires_grad:
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


def test_fill_missing_gradients_makes_idle_parameters_decay_like_any_other():
    model = _Model()
    optimizer = _build(model)
    before = model.w_EFD.detach().clone()
    adamw.fill_missing_gradients(model.parameters())
    assert model.frozen.grad is None
    optimizer.step()
    torch.testing.assert_close(model.w_EFD.detach(), before * (1 - 0.1 * 0.1))
    assert optimizer.state[model.w_EFD]["step"].item() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, "betas is 1.0"),
        ({"betas": (0.9,)}, "betas has 1 values"),
        ({"betas": (0.9, 0.95, 0.99)}, "betas has 3 values"),
        ({"weight_decay": -0.1}, r"weight_decay is -0.1.*nearest legal value is 0"),
        ({"eps": float("nan")}, "eps is nan"),
    ],
)
def test_refuses_impossible_values(options, message):
    with pytest.raises(ValueError, match=message):
        _build(_Model(), **options)
    with pytest.raises(ValueError, match="no parameter"):
        adamw.build([], lr=0.1)


@pytest.mark.parametrize(("name", "schedule"), [("adamw", WarmupCosine), ("adamw_wsd", WarmupStableDecay)])
def test_yaml_builds(name, schedule, request):
    with initialize_config_dir(str(request.config.rootpath / "configs" / "optim"), version_base=None):
        node = dict(compose(name))
    built = instantiate(node.pop("schedule"))
    assert isinstance(built, schedule)
    assert 0 < built(0, 100) <= 1
    optimizer = instantiate(node, _Model().named_parameters())
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert all(group["lr"] == group["initial_lr"] == node["lr"] for group in optimizer.param_groups)


@pytest.mark.parametrize("divisor", [None, 4.0])
def test_the_fused_update_equals_a_plain_one_on_divided_gradients(divisor):
    """FusedAdamW runs on CPUs as well, where nothing builds one: its order of arguments is what could be wrong."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    options = {"lr": 0.1, "betas": (0.8, 0.97), "eps": 1e-5}
    fused = adamw.FusedAdamW([{"params": parameters, "weight_decay": 0.2}], fused=True, **options)
    plain = torch.optim.AdamW([{"params": copies, "weight_decay": 0.2}], foreach=False, **options)
    adamw._create_state(fused, on_cuda=True)
    assert fused.divides
    for _ in range(3):
        for p, q in zip(parameters, copies):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * (divisor or 1.0)
        fused.grad_divisor = None if divisor is None else torch.tensor(divisor)
        fused.step()
        plain.step()
        assert fused.grad_divisor is None  # of one step only
    for p, q in zip(parameters, copies):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert not adamw.FusedAdamW([torch.zeros(2, dtype=torch.float64)], fused=True).divides
