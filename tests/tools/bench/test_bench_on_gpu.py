"""The measurements themselves on a GPU."""

from __future__ import annotations

import pytest
import torch

from tools.bench import decode, memory, train
from tools.bench.clock import peak_growth, seconds_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
OPTIONS = {"device": "cuda", "dtype": "bf16", "threads": 1, "repeats": 2}
GPU = torch.device("cuda")


def test_seconds_include_what_the_device_still_does() -> None:
    x = torch.randn(8192, 8192, device=GPU)
    seconds_of(lambda: x @ x, GPU)
    one, _ = seconds_of(lambda: x @ x, GPU)
    ten, _ = seconds_of(lambda: [x @ x for _ in range(10)], GPU)
    assert ten > 5 * one


def test_growth_is_what_tensors_take_at_most() -> None:
    growth = peak_growth(lambda: torch.zeros(1 << 28, dtype=torch.uint8, device=GPU), GPU)
    assert 1 << 28 <= growth < 1.1 * (1 << 28)


@pytest.mark.parametrize("backend", memory.default_backends("cuda"))
def test_every_backend_is_measured(backend, caplog) -> None:
    sizes = {"batch": 2, "length": 512, "heads": 4, "head_dim": 64, "depth": 2, "expansion": 2, "chunk_size": 64}
    found = memory.measure(backend=backend, **sizes, **OPTIONS)
    assert found["tflops"] > 0 and found["peak_bytes"] > 0
    # Kernels that fail their self-test leave their work, and their name in the row, to the dual form.
    assert not [record.message for record in caplog.records if record.name.startswith("kernels")]


def test_training_and_generation_are_measured() -> None:
    sizes = {"preset": "mag-tiny", "length": 256, "batch": 2, "loop": "plain", "activations": "auto", "steps": 2}
    assert train.measure(**sizes, **OPTIONS)["tokens_per_second"] > 0
    made = decode.measure(preset="mag-tiny", context=4096, batch=1, state="made", tokens=16, **OPTIONS)
    assert made["tokens_per_second"] > 0
