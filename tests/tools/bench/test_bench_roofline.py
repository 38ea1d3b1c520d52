"""Operations, bytes, and what a device could do at best."""

from __future__ import annotations

import pytest
import torch

from tools.bench import roofline
from tools.bench.roofline import (
    attention_flops,
    memory_bytes,
    memory_config,
    memory_flops,
    peak_bandwidth,
    rates,
    roofline_seconds,
    visible_pairs,
)

GPU = torch.device("cuda")


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(("length", "window", "prefix"), [(7, None, 0), (7, 3, 0), (7, 7, 2), (3, 9, 1)])
def test_visible_pairs_are_those_of_the_mask(length, window, prefix) -> None:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = (distance >= 0) & (distance < (window or length))
    assert visible_pairs(length, window, prefix) == int(mask.sum()) + prefix * length


def test_attention_counts_two_products_forward_and_four_backward() -> None:
    pairs, width = 10, 8
    assert attention_flops(heads=3, head_dim=width, batch=2, pairs=pairs) == 2 * 3 * pairs * (2 * 2 * width) * 3


def test_memory_operations_are_those_that_training_counts() -> None:
    # 16 heads of 64, hidden 256, chunk 64, momentum: weights 32,768 a head; an inner backward of half of them; two
    # states read and two written; products in the chunk with 32.5 visible tokens in the mean.
    per_head = 32_768 * (1 + 0.5 + 2 + 2) + 32.5 * 2 * (64 + 256)
    assert memory_flops(16, 64, memory_config(2, 4, 64), 2, 4096) == 3 * 2 * 16 * per_head * 2 * 4096


def test_memory_moves_inputs_output_and_gradients() -> None:
    qkv, gates, y = 3 * 64 * 2, 3 * 4, 64 * 2
    assert memory_bytes(1, 64, 1, 1, 2) == (qkv + gates + y) + (qkv + gates + y) + (qkv + gates)


def test_the_roofline_is_the_longer_of_computing_and_moving(h100) -> None:
    assert roofline_seconds(989.4e12, 0, GPU, "bf16") == pytest.approx(1)
    assert roofline_seconds(1, 3.35e12, GPU, "bf16") == pytest.approx(1)
    found = {"forward_s": 1.0, "backward_s": 1.0, "peak_bytes": 4_000}
    shares = rates(found, 2, 989.4e12, 0, GPU, "bf16")
    assert shares["of_peak"] == pytest.approx(0.5) and shares["of_roofline"] == pytest.approx(0.5)
    assert shares["us_per_token"] == 1e6 and shares["kb_per_token"] == 2
    assert shares["tflops"] == pytest.approx(494.7)


def test_an_unknown_device_has_no_roofline(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "Some New GPU")
    assert peak_bandwidth(GPU) is None and roofline_seconds(1, 1, GPU, "bf16") is None
    assert peak_bandwidth(torch.device("cpu")) is None
    found = {"forward_s": 1.0, "backward_s": 1.0, "peak_bytes": 1}
    assert rates(found, 1, 1, 1, GPU, "bf16")["of_roofline"] is None


def test_every_bandwidth_belongs_to_a_device_whose_peak_is_known() -> None:
    from pretrain.devices import PEAKS

    assert all(any(name in part or part in name for part in PEAKS) for name in roofline._BANDWIDTHS)
