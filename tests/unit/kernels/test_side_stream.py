"""The stream beside the usual one: what runs there begins after all before it, and is waited for."""

from contextlib import contextmanager

import pytest
import torch
from moetrain_kernels import experts

pytestmark = pytest.mark.unit


def test_weight_gradients_beside_wait_and_are_waited_for(monkeypatch):
    done, current = [], ["usual"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            done.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream):
        current.append(stream.name)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("usual"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(experts, "_side_stream", lambda device: Stream("side"))
    with experts.beside(torch.device("cuda")) as join:
        done.append(f"{current[-1]} works")
    done.append(f"{current[-1]} works")
    join()
    assert done == ["side waits for usual", "side works", "usual works", "usual waits for side"]
    done.clear()
    for nowhere in (None, torch.device("cpu")):
        with experts.beside(nowhere) as join:
            assert current[-1] == "usual"
        join()
    assert not done
