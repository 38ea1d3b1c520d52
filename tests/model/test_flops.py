"""Counted operations against those of a real forward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import ModelConfig
from model.flops import _mean_visible, flops_per_token
from model.gates import Gates
from model.memory import MemoryCore, Write


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize(("span", "context"), [(4, 3), (4, 4), (4, 11), (1, 5), (64, 1)])
def test_visible_tokens_are_counted_one_by_one(span, context, restarts) -> None:
    seen = [t % span + 1 if restarts else min(t + 1, span) for t in range(context)]
    assert _mean_visible(span, context, restarts) == pytest.approx(sum(seen) / context)


@torch.no_grad()
def test_linear_maps_are_counted_as_they_are_called(case, small_model, draw_tokens) -> None:
    model, tokens = small_model(case, num_persistent=0), draw_tokens(2, 16)
    called = [0]

    def count(module: torch.nn.Module, inputs: tuple, output: object) -> None:
        called[0] += 2 * module.weight.numel() * inputs[0].shape[0] * inputs[0].shape[1]

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    model(tokens)
    config = model.config
    scores = 0.0
    if case.startswith(("mac", "transformer", "mag", "mal")):
        restarts = config.variant == "mac"
        span = config.segment if restarts else config.window or 16
        scores = 4 * config.dim * _mean_visible(span, 16, restarts) * (2 if restarts else 1) * config.num_layers
    head = 2 * config.dim * config.vocab_size
    assert flops_per_token(config, 16).model == pytest.approx(3 * (called[0] / tokens.numel() + scores + head))


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_memory_is_counted_to_what_the_dual_form_multiplies(depth) -> None:
    config = ModelConfig.preset("lmm-tiny", num_layers=1, memory={"depth": depth, "step_bound": None})
    core = MemoryCore(config.num_heads, config.head_dim, config.memory)
    q, k, v = (torch.randn(1, 64, config.num_heads, config.head_dim) for _ in range(3))
    gates = Gates(*(torch.full((1, 64, config.num_heads), value) for value in (0.01, 0.9, 0.01)))

    def added_in_place(_: tuple, a: tuple, b: tuple, **__: object) -> int:  # torch counts no baddbmm_
        return 2 * a[0] * a[1] * a[2] * b[2]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: added_in_place}) as counter:
        core(q, Write(k, v, gates), None, None, None, False)
    # The real kernel multiplies whole squares of a chunk where half is visible, and joins its decays by products.
    counted = flops_per_token(config, 64).memory / 3 * 64
    assert 0.9 * counted < counter.get_total_flops() < 1.8 * counted


def test_the_memory_stands_apart_and_attention_grows_with_the_context() -> None:
    mac = ModelConfig.preset("mac-340m")
    assert flops_per_token(mac, 4096).memory > 0
    assert flops_per_token(mac, 4096).model == pytest.approx(flops_per_token(mac, 2**21).model)
    transformer = ModelConfig.preset("transformer-340m")
    assert flops_per_token(transformer, 4096).memory == 0
    assert flops_per_token(transformer, 2**17).model > 3 * flops_per_token(transformer, 4096).model
    with pytest.raises(ValueError, match="context is 0"):
        flops_per_token(mac, 0)
