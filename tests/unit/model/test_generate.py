"""The sampler continues a text token by token."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moetrain.config.compose import load_config
from moetrain.config.model import AttentionConfig, ModelConfig, MoEConfig
from moetrain.config.validate import validate
from moetrain.generate import alone
from moetrain.model.build import build_model
from moetrain.model.decoder import Decoder
from moetrain.model.generate import generate, one_document

pytestmark = pytest.mark.unit


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=40, d_model=32, n_layers=2, d_ff=64, moe=MoEConfig(n_experts=0))
    config.attention = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8)
    decoder = Decoder(config, lambda layer: nn.Identity())
    for p in decoder.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    return decoder


def test_greedy_takes_the_likeliest_each_time(model):
    text = [3, 1, 4]
    out = generate(model, text, 6, temperature=0)
    token_BS = torch.tensor([text + out])
    likeliest = model(token_BS, one_document(token_BS))[0].argmax(-1).tolist()
    assert out == likeliest[2:-1]
    assert text == [3, 1, 4]


def test_seed_decides_and_top_k_bounds(model):
    assert generate(model, [1], 20, seed=1) == generate(model, [1], 20, seed=1)
    assert generate(model, [1], 20, seed=1) != generate(model, [1], 20, seed=2)
    assert generate(model, [1], 8, top_k=1, seed=3) == generate(model, [1], 8, temperature=0)
    first = {generate(model, [1], 1, temperature=50.0, top_k=3, seed=s)[0] for s in range(40)}
    token_BS = torch.tensor([[1]])
    assert first == set(model(token_BS, one_document(token_BS))[0, -1].topk(3).indices.tolist())


@pytest.mark.parametrize("options", [{"token_S": []}, {"temperature": -1.0}, {"top_k": -1}])
def test_bad_requests_are_refused(model, options):
    with pytest.raises(ValueError, match=r"prompt|temperature"):
        generate(model, **{"token_S": [1], "n": 1, **options})


@pytest.mark.parametrize(
    "options",
    [["dispatch.placement.every=5", "parallel.ep=2"], ["dispatch=copy_engine", "parallel.ep=2"], ["experts=triton"]],
    ids=" ".join,
)
def test_what_a_run_divides_and_how_it_multiplies_does_not_bind_the_sampler(options):
    config = alone(load_config(options))
    validate(config, 1)
    with torch.device("meta"):
        build_model(config, "cpu")
    assert config.dispatch == load_config([]).dispatch
