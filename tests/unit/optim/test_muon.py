"""Muon against the singular value decomposition, against torch's own, and each expert on its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moetrain.optim import adamw, muon

pytestmark = pytest.mark.unit


def _model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layer = nn.ModuleDict({"w_q": nn.Linear(6, 4, bias=True), "norm": nn.RMSNorm(6)})
    layer["experts"] = nn.ParameterDict({"w_gate_up": nn.Parameter(torch.randn(3, 2, 5, 6) * 0.1)})
    model = nn.ModuleDict({"embed": nn.Embedding(7, 6), "layers": nn.ModuleList([layer])})
    model["head"] = nn.Linear(6, 7, bias=False)
    return model.to(dtype)


def _gradients(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (3, 2, 5, 7)])
def test_singular_values_are_those_of_the_polynomial_and_directions_stay(shape):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()  # the Frobenius norm
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = u @ torch.diag_embed(s) @ v
    torch.testing.assert_close(muon.orthogonalise(x, 5), expected, rtol=1e-11, atol=1e-11)
    assert (torch.linalg.svdvals(muon.orthogonalise(x, 5)) - 1).abs().max() < 0.4


@pytest.mark.parametrize("shape", [(8, 5), (3, 7)])
def test_it_is_torchs_muon_on_a_matrix(monkeypatch, shape):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)  # theirs would round fp64 too
    torch.manual_seed(2)
    ours, theirs = (nn.Parameter(torch.empty(shape, dtype=torch.float64)) for _ in range(2))
    with torch.no_grad():
        theirs.copy_(ours.normal_())
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    mine = muon.build([("w", ours)], **options)
    other = torch.optim.Muon([theirs], **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(shape, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_matrices_by_muon_the_rest_by_adamw_and_every_expert_alone():
    model, reference = _model(), _model()
    optimizer = muon.build(model.named_parameters(), lr=0.01)
    kinds = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    matrices = {"layers.0.w_q.weight", "layers.0.experts.w_gate_up"}
    assert {name for name, slots in kinds.items() if slots == {"momentum_buffer"}} == matrices
    rest = [(name, p) for name, p in reference.named_parameters() if name not in matrices]
    others = adamw.build(rest, lr=0.01)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(whole[name]) for name in matrices}
    for step in range(3):
        _gradients(model, step)
        _gradients(reference, step)
        optimizer.step()
        others.step()
        for name, p in reference.named_parameters():
            if name not in matrices:
                continue
            momenta[name] = 0.95 * momenta[name] + 0.05 * p.grad
            update = 0.05 * p.grad + 0.95 * momenta[name]
            flat = update.flatten(0, -3) if update.ndim > 2 else update[None]
            each = torch.stack([muon.orthogonalise(matrix, 5) for matrix in flat]).view_as(update)
            whole[name] = whole[name] * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(max(p.shape[-2:])) * each
    for name, p in model.named_parameters():
        expected = whole[name] if name in matrices else dict(reference.named_parameters())[name]
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-14)


def test_one_experts_gradient_moves_no_other():
    one, two = _model(), _model()
    for model, scale in ((one, 1.0), (two, 100.0)):
        optimizer = muon.build(model.named_parameters(), lr=0.01)
        _gradients(model, 0)
        model["layers"][0]["experts"]["w_gate_up"].grad[1, 0] *= -scale
        optimizer.step()
    a, b = (model["layers"][0]["experts"]["w_gate_up"] for model in (one, two))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # a scale does not matter, a sign would
    c = _model()
    optimizer = muon.build(c.named_parameters(), lr=0.01)
    _gradients(c, 0)
    optimizer.step()
    changed = (c["layers"][0]["experts"]["w_gate_up"] - a).abs().amax((-1, -2)) > 1e-9
    assert changed.nonzero().tolist() == [[1, 0]]


def test_rates_reach_both_and_bad_values_are_named():
    model = _model()
    optimizer = muon.build(model.named_parameters(), lr=0.01)
    for group in optimizer.param_groups:
        assert group["initial_lr"] == 0.01
        group["lr"] = 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _gradients(model, 0)
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())
    for key, value in (("momentum", 1.0), ("iterations", 0), ("lr", -1.0), ("betas", (0.9, 2.0))):
        with pytest.raises(ValueError, match=key):
            muon.build(model.named_parameters(), **{"lr": 0.1, key: value})
