"""Every family: transformers -> moetrain -> transformers, compared with transformers itself."""

from __future__ import annotations

import pytest
import torch

from moetrain.checkpoint.hf.load import import_hf
from moetrain.checkpoint.hf.save import export_hf
from moetrain.checkpoint.stored import stored_config
from moetrain.testing import hf_families as tiny

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_round_trip(family, tmp_path):
    theirs = tiny.make(family, tmp_path / "source")
    step = import_hf(tmp_path / "source", tmp_path / "run")
    want = tiny.their_logits(theirs)
    got = tiny.our_logits(tmp_path / "run", stored_config(step))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()

    assert export_hf(tmp_path / "run", tmp_path / "back").name == family
    before, after = tiny.tensors(tmp_path / "source"), tiny.tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    again = tiny.reload(tmp_path / "back")
    assert torch.equal(tiny.their_logits(again), want)
    assert again.config.eos_token_id == 2
    assert again.config.max_position_embeddings == 64
