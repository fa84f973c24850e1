"""On a GPU a snapshot is copied while the device works, and still is of its moment."""

import pytest
import torch
from torch import nn

from moetrain.checkpoint.saver import Saver
from moetrain.checkpoint.store import CheckpointStore
from moetrain.config.schema import CheckpointConfig
from moetrain.optim import adamw

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_an_update_right_after_save_is_not_in_it(tmp_path):
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    model = nn.Linear(8192, 8192, device=device)
    optimizer = adamw.build(model.named_parameters(), lr=0.1)
    saver = Saver(CheckpointStore(tmp_path), CheckpointConfig(asynchronous=True), device)
    for step in (1, 2, 3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        saver.before_update()
        optimizer.step()
        expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        moment = optimizer.state[model.weight]["exp_avg"].clone()
        torch.cuda.synchronize()
        saver.save(step, model, optimizer, {"step": step}, {}, {})
        saver.before_update()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
            optimizer.state[model.weight]["exp_avg"].zero_()
        assert saver.wait() == step
        assert saver.store.load(saver.finished()[0].path, model, optimizer) == {"step": step}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name])
        assert torch.equal(optimizer.state[model.weight]["exp_avg"], moment)
    assert saver._snapshot._registered  # page-locked, else the copies were not asynchronous
    saver.close()
