"""One thread per process, pinned before torch starts any: ranks are forked, and forked OpenMP pools hang."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Random numbers do not depend on which tests ran before in this process. Ranks are forked and inherit it."""
    torch.manual_seed(0)
