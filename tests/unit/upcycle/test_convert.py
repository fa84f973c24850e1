"""Dense checkpoint -> MoE checkpoint: parity of whole models, what the report says, and training on."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moetrain.checkpoint.hf.save import export_hf, stored_config
from moetrain.checkpoint.lazy import stored
from moetrain.checkpoint.use import resolve
from moetrain.cli import main
from moetrain.upcycle.command import upcycle
from moetrain.upcycle.convert import build_initializer, convert, open_source
from moetrain.upcycle.report import parity

pytestmark = pytest.mark.unit
TOKENS_BS = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(1))
MODEL = {"d_model": 32, "n_layers": 2, "d_ff": 48, "vocab_size": 264, "attention.n_heads": 4, "attention.head_dim": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dense model whose logits are of order one, so that a wrong layer shows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 264}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.3}
    path = tmp_path_factory.mktemp("dense") / "hf"
    tokens = {"bos_token_id": None, "eos_token_id": 256, "max_position_embeddings": 512}
    config = AutoConfig.for_model("llama", **sizes, **heads, **tokens)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def _parity(source, out, name, dtype=torch.float64, granularity=1, **options):
    initializer = build_initializer(name, options, 4, 2, granularity)
    path, dense, moe = convert(source, out, initializer)
    return parity((dense, open_source(source)[1]), (moe, stored(path / "model")), TOKENS_BS, dtype)


@pytest.mark.parametrize(("name", "granularity"), [("copy", 1), ("virtual_group", 3)])
def test_exact_initializers_keep_the_loss(name, granularity, source, tmp_path):
    measured = _parity(source, tmp_path / "run", name, granularity=granularity)
    # The conversion stores fp32, the models' own dtype, and scales by whole numbers: products round once.
    assert measured.logit_difference < 1e-6 * measured.largest_logit
    assert abs(measured.moe_loss - measured.dense_loss) < 1e-6
    assert measured.largest_logit > 0.5


@pytest.mark.parametrize("name", ["drop", "split"])
def test_inexact_initializers_say_so(name, source, tmp_path):
    measured = _parity(source, tmp_path / "run", name)
    assert measured.logit_difference > 1e-2 * measured.largest_logit


def test_a_checkpoint_is_a_source_too(source, tmp_path):
    assert main(["import", f"source={source}", f"out={tmp_path / 'dense'}"]) == 0
    made = []
    for origin, out in ((source, "a"), (tmp_path / "dense", "b")):
        convert(origin, tmp_path / out, build_initializer("virtual_group", {}, 4, 2, 2))
        made.append({name: t.make() for name, t in stored(resolve(tmp_path / out) / "model").items()})
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_result_opens_in_transformers(source, tmp_path):
    convert(source, tmp_path / "run", build_initializer("virtual_group", {}, 4, 2, 3))
    assert export_hf(tmp_path / "run", tmp_path / "hf").name == "mixtral"
    dense, moe = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, tmp_path / "hf"))
    with torch.no_grad():
        want, got = dense(TOKENS_BS).logits, moe(TOKENS_BS).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (moe.config.eos_token_id, moe.config.max_position_embeddings) == (256, 512)
    assert (moe.config.num_local_experts, moe.config.num_experts_per_tok) == (12, 6)


def test_report_counts_by_hand(source, tmp_path):
    options = {"source": str(source), "out": str(tmp_path / "run"), "upcycle": "virtual_group"}
    text = upcycle({**options, "experts": "4", "top_k": "2", "granularity": "3"})
    ffn, rest = 2 * 3 * 32 * 48, 2 * 264 * 32 + 2 * (4 * 32 * 32 + 2 * 32) + 32
    router = 2 * 12 * 32
    assert f"parameters  {rest + ffn:,} -> {rest + 4 * ffn + router:,}" in text
    assert f"active      {rest + ffn:,} -> {rest + 2 * ffn + router:,}" in text
    relative = re.search(r"largest difference \S+, (\S+) of the largest logit", text)
    assert float(relative[1]) < 1e-5  # fp32
    assert "not checked" in upcycle(
        {**options, "experts": "4", "top_k": "2", "out": str(tmp_path / "b"), "parity": "false"}
    )


def test_training_starts_from_the_result(source, tmp_path):
    arguments = [f"source={source}", f"out={tmp_path / 'moe'}", "experts=4", "top_k=2", "parity=false"]
    assert main(["upcycle", "upcycle=drop", "upcycle.ratio=0.25", *arguments]) == 0
    config = stored_config(resolve(tmp_path / "moe"))
    assert config.model.moe.n_experts == 4
    sizes = [f"model.{key}={value}" for key, value in MODEL.items()]
    experts = ["model.attention.n_kv_heads=4", "model.norm_eps=1e-6", "model.moe.n_experts=4", "model.moe.d_expert=48"]
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    data = ["data=text", f"data.sources.text.path={tmp_path / 'text.txt'}", f"data.cache_dir={tmp_path / 'cache'}"]
    steps = ["train.steps=1", "train.global_batch=2", "train.seq_len=32", "tracker=none", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", f"init.from={tmp_path / 'moe'}", *sizes, *experts, *data, *steps]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upcycle": "virtual_groups"}, "did you mean 'virtual_group'"),
        ({"upcycle.noise": "0.1"}, "no such option"),
        ({"experts": "many"}, "experts='many'"),
        ({"top_k": ""}, "top_k= is missing"),
        ({"top_k": "1"}, "top_k=1"),
        ({"expert": "3"}, "expert: no such key"),
        ({"granularity": "7"}, "nearest legal value: 6"),
    ],
)
def test_refusals_come_before_anything_is_written(change, message, source, tmp_path):
    options = {
        "source": str(source),
        "out": str(tmp_path / "run"),
        "upcycle": "virtual_group",
        "experts": "4",
        "top_k": "2",
    }
    with pytest.raises(ValueError, match=message):
        upcycle({**options, **change})
    assert not (tmp_path / "run").exists()


def test_a_moe_is_no_source(source, tmp_path):
    convert(source, tmp_path / "moe", build_initializer("copy", {}, 4, 2, 1))
    with pytest.raises(ValueError, match="a MoE model already"):
        convert(tmp_path / "moe", tmp_path / "again", build_initializer("copy", {}, 4, 2, 1))
