"""Import and upcycling by one, two, and four ranks make the same tensors; several ranks really share the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moetrain.checkpoint import manifest
from moetrain.checkpoint.hf.load import import_hf
from moetrain.checkpoint.lazy import stored
from moetrain.testing.ranks import run_ranks
from moetrain.upcycle.convert import build_initializer, convert

pytestmark = pytest.mark.distributed


def _convert(source: str, out: str, name: str) -> str:
    options = {"by": "clustering"} if name == "split" else {}
    return str(convert(source, out, build_initializer(name, options, 4, 2, 1 if name == "drop" else 2)).path)


def _import(source: str, out: str) -> str:
    return str(import_hf(source, out))


def _tensors(step: str) -> dict[str, torch.Tensor]:
    assert manifest.problems(Path(step), None) == []
    return {name: tensor.make() for name, tensor in stored(Path(step) / "model").items()}


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads)).save_pretrained(tmp_path / "hf")
    return str(tmp_path / "hf")


def test_every_number_of_ranks_makes_the_same_tensors(source, tmp_path):
    imported = _import(source, str(tmp_path / "import1"))
    by_ranks = run_ranks(_import, 2, source, str(tmp_path / "import2"))
    assert _equal(_tensors(imported), _tensors(by_ranks[0]))
    for name in ("drop", "split"):
        want = _tensors(_convert(source, str(tmp_path / f"{name}1"), name))
        for world, origin in ((2, source), (4, str(tmp_path / "import1"))):
            step = run_ranks(_convert, world, origin, str(tmp_path / f"{name}{world}"), name)[0]
            assert _equal(_tensors(step), want)
            assert len(list((Path(step) / "model").glob("__*.distcp"))) > 1


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
