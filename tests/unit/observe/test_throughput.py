"""Throughput on a clock the test turns by hand."""

import contextlib

import pytest
import torch

from moetrain.observe import throughput
from moetrain.observe.throughput import Throughput, peak_bf16_flops

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_evaluation_and_checkpoints_do_not_count():
    clock = Clock()
    meter = Throughput(world_size=4, device=torch.device("cpu"), flops_per_token=lambda attended: attended, clock=clock)
    clock.now += 50.0  # building the model
    meter.start()
    clock.now += 2.0
    first = meter.step(tokens=1000, attended=1.0)
    with meter.excluded():
        clock.now += 30.0
    clock.now += 1.0
    with contextlib.suppress(KeyError), meter.excluded():
        clock.now += 7.0
        raise KeyError
    second = meter.step(tokens=1000, attended=1.0)
    assert first["tokens_per_s"] == 500.0
    assert first["tokens_per_s_per_gpu"] == 125.0
    assert second["tokens_per_s"] == 1000.0  # the excluded time of one step does not leak into the next
    assert first["mfu"] is None


def test_cpu_memory_is_this_process():
    meter = Throughput(world_size=1, device=torch.device("cpu"))
    # torch alone is resident with more than 50 MB; a unit mistake is a factor of 1000.
    assert 0.05 < meter.step(1, 1.0)["peak_memory_gb"] < 50


def test_mfu_is_over_the_dense_peak_of_one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7_000_000_000)
    clock = Clock()
    meter = Throughput(
        world_size=2, device=torch.device("cuda", 0), flops_per_token=lambda attended: 1e6 * attended, clock=clock
    )
    clock.now += 1.0
    row = meter.step(tokens=989_400, attended=1e3)  # 494700 tokens/s on each GPU, 494.7 TFLOP/s of 989.4
    assert row["mfu"] == pytest.approx(0.5, rel=1e-12)
    assert row["peak_memory_gb"] == 7.0


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_device_names_as_drivers_spell_them(name, tera):
    assert peak_bf16_flops(name) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""])
def test_unknown_devices_have_no_peak(name):
    assert peak_bf16_flops(name) is None


def test_no_row_hides_a_later_one():
    names = [words for words, _ in throughput.PEAK_BF16]
    for i, words in enumerate(names):
        assert peak_bf16_flops(" ".join(words)) == throughput.PEAK_BF16[i][1], words
