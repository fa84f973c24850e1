"""Every preset composes with the program's own defaults, and brings the router and balance losses it is known for."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetrain.config.compose import load_config
from moetrain.config.model import check_model

pytestmark = pytest.mark.unit

# router class, renormalize, scale; balance losses with their strength
PUBLISHED = {
    "olmoe_1b_7b": ("SoftmaxTopK", False, 1.0, {"switch": 0.01, "z_loss": 0.001}),
    "mixtral_8x7b": ("SoftmaxTopK", True, 1.0, {"switch": 0.02}),
    "mixtral_8x22b": ("SoftmaxTopK", True, 1.0, {"switch": 0.001}),
    "qwen3_30b_a3b": ("SoftmaxTopK", True, 1.0, {"switch": 0.001}),
    "qwen2_57b_a14b": ("SoftmaxTopK", False, 1.0, {"switch": 0.001}),
    "deepseek_v2_lite": ("SoftmaxTopK", False, 1.0, {"switch": 0.001}),
    "deepseek_v3": ("SigmoidTopK", True, 2.5, {"bias": 0.001, "switch": 0.0001}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_brings_its_router_and_balance(name):
    config = load_config([f"model={name}"])
    check_model(config.model)
    router, renormalize, scale, losses = PUBLISHED[name]
    assert config.router["_target_"].endswith(f".{router}")
    assert (config.router["renormalize"], config.router["scale"]) == (renormalize, scale)
    assert config.router["top_k"] == config.model.moe.top_k
    assert all("_target_" in node for node in config.balance.values())
    assert {k: node.get("coefficient", node.get("rate")) for k, node in config.balance.items()} == losses


def test_command_line_wins_over_a_preset():
    config = load_config(["model=qwen3_30b_a3b", "model.moe.top_k=4", "router.renormalize=false"])
    assert (config.model.moe.top_k, config.router["top_k"], config.router["renormalize"]) == (4, 4, False)
    assert load_config(["model=olmoe_1b_7b", "router=sigmoid"]).router["_target_"].endswith(".SigmoidTopK")


def test_every_preset_file_names_itself():
    presets = sorted((Path(__file__).parents[3] / "configs" / "model").glob("*.yaml"))
    assert {p.stem for p in presets} >= PUBLISHED.keys() | {"tiny", "small_300m_active"}
    for path in presets:
        assert load_config([f"model={path.stem}"]).model.name == path.stem
