"""The bytes that tensors hold are counted once each, from when they are made to when they are freed."""

from __future__ import annotations

import torch

from tools.bench.clock import peak_growth
from tools.bench.live_tensors import LiveTensors

CPU = torch.device("cpu")
KILOBYTE = 256  # elements of fp32


def test_what_is_freed_does_not_count_and_views_take_nothing() -> None:
    with LiveTensors() as live:
        first = torch.ones(KILOBYTE)
        assert (live.bytes, live.peak_bytes) == (1024, 1024)
        view = first.view(16, -1)[3:]
        assert live.bytes == 1024
        del first
        assert live.bytes == 1024  # the view keeps it
        del view
        assert (live.bytes, live.peak_bytes) == (0, 1024)
        second = torch.ones(KILOBYTE // 2)
        assert (live.bytes, live.peak_bytes) == (512, 1024)
        second.add_(1)
        assert live.bytes == 512


def test_inputs_do_not_count_and_a_chain_holds_two_at_a_time() -> None:
    x = torch.ones(KILOBYTE)

    def chain() -> None:
        y = x
        for _ in range(5):
            y = y + 1

    assert peak_growth(chain, CPU) == 2 * 1024


def test_what_autograd_keeps_counts_until_the_backward() -> None:
    x = torch.ones(KILOBYTE, requires_grad=True)

    def forward_and_backward() -> None:
        y = x.exp().sin().sum()  # the exponential and its input's sine are kept: the exponential serves both
        torch.autograd.grad(y, x)

    kept = peak_growth(forward_and_backward, CPU)
    with torch.no_grad():
        dropped = peak_growth(lambda: x.exp().sin().sum(), CPU)
    assert kept > dropped == 2 * 1024
