"""Import and upcycling by one, two, and four ranks make the same tensors; several ranks really share the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moetrain.checkpoint import manifest
from moetrain.checkpoint.hf.load import import_hf
from moetrain.checkpoint.hf.save import export_hf
from moetrain.checkpoint.lazy import stored
from moetrain.testing.ranks import RankFailure, run_ranks
from moetrain.upcycle.convert import build_initializer, convert

pytestmark = pytest.mark.distributed


def _convert(source: str, out: str, name: str) -> str:
    options = {"by": "clustering"} if name == "split" else {}
    return str(convert(source, out, build_initializer(name, options, 4, 2, 1 if name == "drop" else 2)).path)


def _import(source: str, out: str) -> str:
    return str(import_hf(source, out))


def _export(step: str, out: str) -> None:
    export_hf(step, out, shard_bytes=20_000)


def _tensors(step: str) -> dict[str, torch.Tensor]:
    assert manifest.problems(Path(step), None) == []
    return {name: tensor.make() for name, tensor in stored(Path(step) / "model").items()}


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 264}
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


def test_every_number_of_ranks_exports_the_same_files(source, tmp_path):
    step = _convert(source, str(tmp_path / "run"), "drop")
    _export(step, str(tmp_path / "by1"))
    run_ranks(_export, 3, step, str(tmp_path / "by3"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "by1").iterdir()}
    assert len([name for name in files if name.startswith("model-")]) > 3
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "by3").iterdir()}
    with pytest.raises(RankFailure, match="already exists"):
        run_ranks(_export, 2, step, str(tmp_path / "by3"))


@pytest.mark.parametrize(
    ("name", "granularity", "options"),
    [
        ("virtual_group", 2, {}),
        ("copy", 1, {"noise": "0.1"}),
        ("diversify", 1, {}),
        ("split", 1, {"by": "importance", "shared_experts": "4"}),
        ("efficient_scale", 2, {"layers": "3", "width_by": "aki"}),
        ("merge", 1, {"router_rows": "gate_mean"}),
    ],
)
def test_other_initializers_by_ranks(name, granularity, options, source, tmp_path):
    made = []
    for world in (1, 2):
        out = tmp_path / f"by{world}"
        sources = [source] * (2 if name == "merge" else 1)
        made.append(run_ranks(_convert_with, world, sources, str(out), name, granularity, options)[0])
    assert _equal(_tensors(made[0]), _tensors(made[1]))


def _convert_with(sources: list[str], out: str, name: str, granularity: int, options: dict[str, str]) -> str:
    return str(convert(sources, out, build_initializer(name, options, 4, 2, granularity)).path)


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
