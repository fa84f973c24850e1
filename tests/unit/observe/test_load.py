"""Load metrics against counts done by hand."""

import math

import pytest
import torch

from moetrain.observe.load import load_metrics

pytestmark = pytest.mark.unit


def test_hand_counted_layers():
    # 8 tokens, top-2: 16 choices over 4 experts, so the mean is 4.
    count_LE = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [7, 5, 4, 0]])
    entropy_L = torch.tensor([8 * math.log(4), 0.0, 8 * 0.5], dtype=torch.float64)
    metrics = load_metrics([1, 3, 5], count_LE, entropy_L, torch.tensor([0, 4, 2]), tokens=8)
    expected = {
        1: (1.0, 0.0, math.log(4), 0, 0.0),
        3: (4.0, math.sqrt((144 + 3 * 16) / 4) / 4, 0.0, 3, 4 / 16),
        5: (7 / 4, math.sqrt((9 + 1 + 0 + 16) / 4) / 4, 0.5, 1, 2 / 16),
    }
    names = ("load_max_over_mean", "load_cv", "router_entropy", "dead_experts", "dropped_share")
    assert list(metrics) == [f"moe/{layer}/{name}" for layer in expected for name in names]
    for layer, values in expected.items():
        for name, value in zip(names, values, strict=True):
            assert metrics[f"moe/{layer}/{name}"] == pytest.approx(value, abs=1e-15), (layer, name)


def test_counts_beyond_float32_stay_exact():
    big = 2**30
    metrics = load_metrics([0], torch.tensor([[big + 1, big - 1]]), torch.zeros(1), torch.zeros(1), tokens=big)
    assert metrics["moe/0/load_max_over_mean"] == (big + 1) / big


def test_a_layer_without_tokens_is_finite():
    metrics = load_metrics([0], torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1), torch.zeros(1), torch.tensor(0.0))
    assert metrics == {
        "moe/0/load_max_over_mean": 0.0,
        "moe/0/load_cv": 0.0,
        "moe/0/router_entropy": 0.0,
        "moe/0/dead_experts": 4,
        "moe/0/dropped_share": 0.0,
    }


def test_hand_counted_ranks():
    # 16 choices of 4 experts on 2 ranks; in the second layer expert 0 has changed places with expert 3.
    count_LE = torch.tensor([[7, 5, 4, 0], [7, 5, 4, 0]])
    rank_LE = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0]])
    metrics = load_metrics([1, 3], count_LE, torch.zeros(2), torch.zeros(2), 8, rank_LE)
    assert metrics["moe/1/rank_load_max_over_mean"] == 12 / 8
    assert metrics["moe/3/rank_load_max_over_mean"] == 11 / 8
    assert metrics["rank_load_max_over_mean"] == 12 / 8
    silent = load_metrics([1, 3], 0 * count_LE, torch.zeros(2), torch.zeros(2), 8, rank_LE)
    assert silent["rank_load_max_over_mean"] == 0.0


def test_a_dense_model_has_no_load():
    none = torch.zeros(0)
    assert load_metrics([], torch.zeros(0, 8), none, none, 10) == {}
