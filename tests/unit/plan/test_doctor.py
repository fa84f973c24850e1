"""`doctor` on this machine, and on machines it is told it has."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from moetrain.plan import doctor

pytestmark = pytest.mark.unit


def lines_of(text):
    found = {}
    for line in text.splitlines():
        if line.startswith("  "):
            label, _, value = line.strip().partition("  ")
            found[label] = value.strip()
    return found


@pytest.fixture
def two_gpus(monkeypatch):
    """Two H200 of which 0 can read 1 but not the other way."""
    device = SimpleNamespace(name="NVIDIA H200", total_memory=150_000_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: (i, j) == (0, 1))


@pytest.mark.timeout(120)  # it waits for nothing, such as a network
def test_reports_every_backend():
    text = doctor.diagnose()
    lines = lines_of(text)
    assert lines["torch"].startswith(torch.__version__)
    assert lines["experts=reference"] == "ready"
    assert lines["dispatch=local"] == "ready"
    for group, backends in {
        "experts": "reference grouped_mm triton",
        "dispatch": "local collective copy_engine deepep",
        "tracker": "wandb tensorboard",
    }.items():
        for backend in backends.split():
            verdict = lines[f"{group}={backend}"]
            assert verdict == "ready" or verdict.startswith("missing: "), (backend, verdict)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_needs_one():
    lines = lines_of(doctor.diagnose())
    assert lines["GPU"].startswith("none")
    assert "CUDA GPU" in lines["experts=triton"]
    assert "2 CUDA GPUs (found 0)" in lines["dispatch=copy_engine"]


def test_gpus_and_their_peers(two_gpus):
    lines = dict(doctor._devices())
    assert lines["GPU 1"] == "NVIDIA H200, 150 GB, capability 9.0"
    assert doctor.peer_access() == [[True, True], [False, True]]
    assert lines["peer access"] == "0: ++; 1: -+"
    assert "peer access between every pair of GPUs" in doctor._copy_engine()


def test_peer_matrix_of_a_full_mesh(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: True)
    assert dict(doctor._devices())["peer access"] == "every pair"
    assert "peer access between every pair of GPUs" not in doctor._copy_engine()


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    lines = lines_of(doctor.diagnose())
    assert lines["tracker=wandb"] == "missing: package wandb (pip install 'moetrain[wandb]')"
    assert "not in this version" in lines["experts=reference"]


def test_a_failing_call_is_a_verdict(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("grouped gemm needs compute capability 9\nmore")

    monkeypatch.setattr(F, "grouped_mm", refuse)
    assert "capability 9)" in lines_of(doctor.diagnose())["experts=grouped_mm"]


def test_no_probe_ends_the_report(monkeypatch):
    def broken(*args):
        raise OSError("no such device")

    monkeypatch.setattr(doctor.psutil, "virtual_memory", broken)
    monkeypatch.setattr(doctor.shutil, "disk_usage", broken)
    lines = lines_of(doctor.diagnose())
    assert lines["memory"] == "could not tell (OSError: no such device)"
    assert lines["experts=reference"] == "ready"


def test_small_shared_memory_is_pointed_out(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(64_000_000, 0, 64_000_000))
    assert "--ipc=host" in doctor._shared_memory()
