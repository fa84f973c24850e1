"""Dense checkpoint -> MoE checkpoint: parity of whole models, what the report says, and training on."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moetrain.checkpoint.hf.save import export_hf
from moetrain.checkpoint.lazy import stored
from moetrain.checkpoint.stored import stored_config
from moetrain.checkpoint.use import resolve
from moetrain.cli import main
from moetrain.upcycle.base import Model
from moetrain.upcycle.command import upcycle
from moetrain.upcycle.convert import build_initializer, convert
from moetrain.upcycle.report import logits, parity

pytestmark = pytest.mark.unit
TOKENS_BS = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(1))


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
    made = convert(source, out, initializer)
    (measured,) = parity(made.sources, Model(made.config, stored(made.path / "model")), TOKENS_BS, dtype)
    return measured


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


@pytest.mark.parametrize(
    ("family", "initializer", "options", "becomes"),
    [
        ("qwen2", "virtual_group", {}, "qwen2_moe"),  # its biases fit no family without shared experts: silent ones
        ("qwen3", "virtual_group", {}, "qwen3_moe"),
        ("mistral", "efficient_scale", {}, "mixtral"),
        ("qwen2", "split", {"shared_experts": "4", "shared_gate": "true"}, "qwen2_moe"),
    ],
)
def test_children_of_every_dense_family_open_in_transformers(family, initializer, options, becomes, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 264}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes, **heads, sliding_window=None, bos_token_id=None, eos_token_id=256)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter) if "bias" in name else 0.0
    theirs.save_pretrained(tmp_path / "dense")
    made = convert(tmp_path / "dense", tmp_path / "run", build_initializer(initializer, options, 4, 2, 2))
    assert export_hf(tmp_path / "run", tmp_path / "hf").name == becomes
    moe, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    want = logits(Model(made.config, stored(made.path / "model")), TOKENS_BS, torch.float32)
    with torch.no_grad():
        got = moe.eval()(TOKENS_BS).logits
        exact = theirs.eval()(TOKENS_BS).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    if initializer != "split":
        assert (got - exact).abs().max() < 1e-5 * exact.abs().max()


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
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    data = ["data=text", f"data.sources.text.path={tmp_path / 'text.txt'}", f"data.cache_dir={tmp_path / 'cache'}"]
    steps = ["train.steps=1", "train.global_batch=2", "train.seq_len=32", "tracker=none", f"run.dir={tmp_path / 'run'}"]
    start = ["train", f"init.from={tmp_path / 'moe'}", *data, *steps]
    assert main([*start, "model.d_model=64"]) == 2
    added = ["balance=[switch,bias]", 'init.allow=["*.bias_E"]']  # a plugin with state that the checkpoint lacks
    assert main([*start, *added]) == 0
    trained = stored_config(resolve(tmp_path / "run"))
    assert trained.model.moe == config.model.moe
    assert main(["generate", f"checkpoint={tmp_path / 'run'}", "prompt=the", "max_tokens=2"]) == 0


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


def test_an_interrupted_conversion_is_made_again(source, tmp_path):
    left = tmp_path / "run" / "checkpoints" / ".step_00000000.tmp-0a1b"
    (left / "model").mkdir(parents=True)
    made = convert(source, tmp_path / "run", build_initializer("copy", {}, 4, 2, 1))
    assert made.path == resolve(tmp_path / "run")
    assert not left.exists()
    with pytest.raises(ValueError, match="already holds checkpoints"):
        convert(source, tmp_path / "run", build_initializer("copy", {}, 4, 2, 1))
