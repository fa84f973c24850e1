"""Other layouts of the same model, what is refused, and the two verbs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moetrain.checkpoint import manifest
from moetrain.checkpoint.hf import files
from moetrain.checkpoint.hf.families import FAMILIES
from moetrain.checkpoint.hf.load import import_hf
from moetrain.checkpoint.hf.save import export_hf
from moetrain.checkpoint.hf.translate import choose, differences, from_hf, read
from moetrain.checkpoint.lazy import stored
from moetrain.checkpoint.stored import stored_config
from moetrain.checkpoint.use import resolve
from moetrain.cli import main
from moetrain.config.compose import load_config
from moetrain.testing import hf_families as tiny

pytestmark = pytest.mark.unit


def _imported(source: Path, out: Path) -> dict[str, torch.Tensor]:
    import_hf(source, out)
    return {name: tensor.make() for name, tensor in stored(resolve(out) / "model").items()}


def _same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_that_are_stacked_on_disk(family, tmp_path):
    model = tiny.make(family, tmp_path / "each")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in tiny.tensors(tmp_path / "stacked"))
    assert _same(_imported(tmp_path / "each", tmp_path / "a"), _imported(tmp_path / "stacked", tmp_path / "b"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_may_be_written_stacked(family, tmp_path):
    model = tiny.make(family, tmp_path / "each")
    import_hf(tmp_path / "each", tmp_path / "run")
    assert main(["export", f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'back'}", "experts=stacked"]) == 0
    names = tiny.tensors(tmp_path / "back")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    assert not any(".experts.0." in name for name in names)
    assert torch.equal(tiny.their_logits(tiny.reload(tmp_path / "back")), tiny.their_logits(model))
    assert main(["export", f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'b'}", "experts=fused"]) == 2


def test_a_shard_keeps_no_layer_alive(tmp_path, monkeypatch):
    """Its tensors are copies: a view of one expert would hold all experts of its layer until the shard is written."""
    held = []

    def keep(tensors, *args, **kwargs):
        held.extend((name, t.nbytes, t.untyped_storage().nbytes()) for name, t in tensors.items())
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr(files, "save_file", keep)
    tiny.make("qwen3_moe", tmp_path / "source")
    import_hf(tmp_path / "source", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "back", shard_bytes=20_000)
    assert any(".experts." in name for name, _, _ in held)
    assert [name for name, size, storage in held if size != storage] == []


def test_shards_in_and_out(tmp_path):
    model = tiny.make("qwen3_moe", tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert _same(_imported(tmp_path / "one", tmp_path / "a"), _imported(tmp_path / "many", tmp_path / "b"))
    export_hf(tmp_path / "a", tmp_path / "back", shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert torch.equal(tiny.their_logits(tiny.reload(tmp_path / "back")), tiny.their_logits(model))


def test_names_of_transformers_4(tmp_path):
    tiny.make("deepseek_v3", tmp_path / "source")
    new = from_hf(json.loads((tmp_path / "source/config.json").read_text()))
    scaling = {**tiny.YARN, "type": "yarn"}
    del scaling["rope_type"], scaling["rope_theta"]
    old = {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": scaling, "torch_dtype": "float32"}
    tiny.edit_config(tmp_path / "source", **old, dtype=None)
    assert from_hf(json.loads((tmp_path / "source/config.json").read_text())) == new

    tiny.make("qwen3_moe", tmp_path / "moe")
    tiny.edit_config(tmp_path / "moe", num_local_experts=None, num_experts=4)
    assert from_hf(json.loads((tmp_path / "moe/config.json").read_text())).model.moe.n_experts == 4


def test_written_config_has_the_names_of_both(tmp_path):
    tiny.make("llama", tmp_path / "source")
    import_hf(tmp_path / "source", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["rope_scaling"]["rope_type"] == config["rope_parameters"]["rope_type"] == "llama3"
    assert config["torch_dtype"] == config["dtype"] == "float32"


def test_weights_keep_their_dtype(tmp_path):
    tiny.make("mixtral", tmp_path / "fp32").bfloat16().save_pretrained(tmp_path / "source")
    assert {t.dtype for t in _imported(tmp_path / "source", tmp_path / "run").values()} == {torch.bfloat16}
    export_hf(tmp_path / "run", tmp_path / "back")
    assert _same(tiny.tensors(tmp_path / "source"), tiny.tensors(tmp_path / "back"))


def test_unmatched_tensors_are_named(tmp_path):
    tiny.make("olmoe", tmp_path / "source")
    tensors = tiny.tensors(tmp_path / "source")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, tmp_path / "source/model.safetensors")
    with pytest.raises(ValueError, match=r"missing in the source: model\.layers\.1\.mlp\.experts\.3\.up_proj") as error:
        import_hf(tmp_path / "source", tmp_path / "run")
    assert "unexpected in the source: model.layers.0.self_attn.sinks" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_transposed_tensor_is_refused(tmp_path):
    tiny.make("llama", tmp_path / "source")
    tensors = tiny.tensors(tmp_path / "source")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, tmp_path / "source/model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} has shape \(32, 40\)"):
        import_hf(tmp_path / "source", tmp_path / "run")


def test_known_leftovers_are_not_errors(tmp_path):
    tiny.make("deepseek_v3", tmp_path / "source")
    tensors = tiny.tensors(tmp_path / "source")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)  # the head that predicts a second token
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / "source/model.safetensors")
    tiny.edit_config(tmp_path / "source", num_nextn_predict_layers=1)
    import_hf(tmp_path / "source", tmp_path / "run")


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mistral", {"sliding_window": 8}, "sliding_window=8"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic'",
        ),
        ("qwen3_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 1}, "mlp_only_layers"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama", {"model_type": "gpt2"}, "model_type='gpt2'"),
        ("llama", {"model_type": "gpt_oss"}, "attention sinks"),
    ],
)
def test_what_moetrain_cannot_compute_is_refused(family, change, message, tmp_path):
    base = {"model_type": family, **tiny.COMMON, **tiny.FAMILIES[family]}
    from_hf(base)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        from_hf({**base, **change})


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("tiny", "mixtral"),
        ("olmoe_1b_7b", "olmoe"),
        ("qwen3_30b_a3b", "qwen3_moe"),
        ("qwen2_57b_a14b", "qwen2_moe"),
        ("deepseek_v2_lite", "deepseek_v2"),
        ("deepseek_v3", "deepseek_v3"),
    ],
)
def test_family_of_a_model_that_was_not_imported(model, family):
    config = load_config([f"model={model}"])
    assert choose(config).name == family
    assert differences(FAMILIES["llama"], config) != []


def test_a_model_that_no_family_holds():
    with pytest.raises(ValueError, match=r"nearest is mixtral, but model\.moe\.d_shared=8 would be 0"):
        choose(load_config(["model.moe.d_shared=8"]))


def test_read_is_checked_against_a_hand_made_config():
    flat = read(FAMILIES["qwen2_moe"], {"model_type": "qwen2_moe", **tiny.COMMON, **tiny.FAMILIES["qwen2_moe"]})
    expected = {
        "model.d_model": 32,
        "model.n_layers": 3,
        "model.attention.head_dim": 8,
        "model.attention.qkv_bias": True,
        "model.moe.d_expert": 24,
        "model.moe.d_shared": 20,
        "model.moe.first_k_dense": 1,
        "model.moe.every": 1,
        "router.renormalize": False,
    }
    assert {key: flat[key] for key in expected} == expected


def test_the_verbs(tmp_path, capsys):
    model = tiny.make("qwen3", tmp_path / "source")
    (tmp_path / "source/tokenizer.json").write_text("{}")
    (tmp_path / "source/tokenizer_config.json").write_text("{}")
    assert main(["import", f"source={tmp_path / 'source'}", f"out={tmp_path / 'run'}"]) == 0
    assert stored_config(resolve(tmp_path / "run")).data.tokenizer == str((tmp_path / "run/hf").resolve())
    assert manifest.problems(resolve(tmp_path / "run"), None) == []
    assert main(["export", f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'back'}"]) == 0
    assert torch.equal(tiny.their_logits(tiny.reload(tmp_path / "back")), tiny.their_logits(model))
    assert (tmp_path / "back/tokenizer.json").read_text() == "{}"
    assert main(["import", f"source={tmp_path / 'source'}", f"out={tmp_path / 'run'}"]) == 2
    assert main(["export", f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'back'}"]) == 2
    assert main(["import", "source=nowhere", f"out={tmp_path / 'other'}"]) == 2
    assert main(["import", f"source={tmp_path / 'source'}"]) == 2
    assert "out= is missing" in capsys.readouterr().err
