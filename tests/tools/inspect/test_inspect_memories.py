"""What is kept of every token: the oracle's numbers, at the tokens that they belong to, in every variant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.memory.options import MemoryOptions
from model import TitansLM
from model.gates import GateProjection
from model.memory import MemoryCore
from pretrain.errors import UserError
from tests.kernels.token_norms_oracle import by_the_token
from tests.model_cases import build_model, random_tokens
from tools.inspect import memories
from tools.inspect.influence import answer_likelihoods
from tools.inspect.memories import QUANTITIES, memory_cores, token_losses, trace, writes_left_out

CASES = ("mac", "mac-paper", "mag", "mal", "lmm", "linear", "delta")
LENGTH = 21


def written(model: TitansLM, tokens: Tensor) -> list[dict[str, list[Tensor]]]:
    """What each memory is given when the model reads tokens at once, and what it answers: a list of pieces by name."""
    found: list[dict[str, list[Tensor]]] = []
    hooks = []
    for core in (module for module in model.modules() if isinstance(module, MemoryCore)):
        kept: dict[str, list[Tensor]] = {name: [] for name in ("q", "k", "v", "alpha", "eta", "theta", "y")}
        found.append(kept)

        def keep(_: Any, arguments: Any, output: Any, kept: dict[str, list[Tensor]] = kept) -> None:
            q, write, *_ = arguments
            if write is not None:
                for name, x in zip(kept, (q, write.k, write.v, *write.gates, output[0]), strict=True):
                    kept[name].append(x)

        hooks.append(core.register_forward_hook(keep))
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_token_layer_and_head_has_the_oracles_numbers(
    case: str, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of 10 tokens, which end inside chunks and segments, against the whole at once."""
    model, tokens = build_model(case, num_heads=heads), random_tokens(1, LENGTH)
    monkeypatch.setattr(memories, "PIECE", 10)
    found = trace(model, tokens[0].tolist(), "model")
    config = model.config.memory
    for core, kept, layer in zip(memory_cores(model, ""), written(model, tokens), found.layers, strict=True):
        whole = {name: torch.cat(parts, 1) for name, parts in kept.items()}
        options = MemoryOptions(
            config.chunk, config.activation, config.forget_to, config.objective, config.bound, core.scale
        )
        inputs = [whole[name] for name in ("q", "k", "v", "alpha", "eta", "theta")]
        expected = by_the_token(inputs, [w.detach() for w in core.learned()], options)._asdict()
        expected |= {name: whole[name] for name in ("alpha", "eta", "theta")} | {"retrieval": whole["y"].norm(dim=-1)}
        assert layer.keys() == expected.keys() == {quantity.name for quantity in QUANTITIES}
        for name, values in expected.items():
            assert layer[name].shape == (LENGTH, heads)
            np.testing.assert_allclose(layer[name], values[0].detach().numpy(), rtol=1e-6, atol=1e-9, err_msg=name)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_means_and_losses_are_those_that_the_model_gives(case: str) -> None:
    model, tokens = build_model(case), random_tokens(1, LENGTH)
    found = trace(model, tokens[0].tolist(), "model")
    output = model(tokens, with_stats=True)
    for layer, stats in zip(found.layers, output.stats, strict=True):
        for name in ("surprise", "alpha", "eta", "theta"):
            np.testing.assert_allclose(layer[name].mean(), stats[name].item(), rtol=1e-6)
    behind = output.logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    np.testing.assert_allclose(found.losses[1:], -behind.numpy(), rtol=1e-5)
    assert np.isnan(found.losses[0])


def test_a_layer_is_the_norm_over_heads_and_the_mean_of_gates() -> None:
    found = trace(build_model("mag"), random_tokens(1, LENGTH)[0].tolist(), "model")
    by_name = {quantity.name: quantity for quantity in QUANTITIES}
    surprise = found.of_layers(by_name["surprise"])
    assert surprise.shape == (2, LENGTH)
    np.testing.assert_allclose(surprise[1], np.linalg.norm(found.layers[1]["surprise"], axis=1))
    np.testing.assert_allclose(found.of_layers(by_name["alpha"])[0], found.layers[0]["alpha"].mean(1))


def test_looking_changes_nothing_and_leaves_nothing_behind() -> None:
    model, tokens = build_model("mac"), random_tokens(1, LENGTH)
    with torch.no_grad():
        before = model(tokens).logits
        trace(model, tokens[0].tolist(), "model")
        list(answer_likelihoods(model, tokens[0].tolist(), range(19, 21), [range(3, 9)], batch_size=2))
        assert torch.equal(model(tokens).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_memory_is_refused() -> None:
    with pytest.raises(UserError, match="some/model: its variant is transformer, which has no memory"):
        trace(build_model("transformer"), [1, 2, 3], "some/model")


class _ZeroSteps:
    """GateProjection.forward with theta 0 at given tokens of a sequence that is read in one call a layer."""

    def __init__(self, forward: Any, span: range) -> None:
        self.forward, self.span, self.read = forward, span, 0

    def __call__(self, x: Tensor) -> Any:
        gates = self.forward(x)
        theta = gates.theta.clone()
        for token in self.span:
            if self.read <= token < self.read + x.shape[1]:
                theta[:, token - self.read] = 0.0
        self.read += x.shape[1]
        return gates._replace(theta=theta)


@torch.no_grad()
@pytest.mark.parametrize("case", ["mac", "mag", "mal", "lmm", "linear"])
def test_influence_is_the_answers_loss_without_the_spans_steps(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, answer = build_model(case), random_tokens(1, LENGTH), range(18, 21)
    spans = [range(0), range(2, 3), range(4, 11), range(7, 9), range(1, 18)]

    def likelihood(span: range) -> float:
        changed = build_model(case)
        for module in changed.modules():
            if isinstance(module, GateProjection):
                module.forward = _ZeroSteps(module.forward, span)
        scores = changed(tokens).logits.log_softmax(-1)[0, answer.start - 1 : answer.stop - 1]
        return scores.gather(1, tokens[0, answer.start : answer.stop, None]).sum().item()

    expected = [likelihood(span) for span in spans]
    assert len({round(value, 6) for value in expected}) == len(spans)
    for piece, batch_size in ((1024, 8), (10, 2), (7, 1)):
        monkeypatch.setattr(memories, "PIECE", piece)
        found = list(answer_likelihoods(model, tokens[0].tolist(), answer, spans, batch_size=batch_size))
        assert [len(some) for some in found] == [min(batch_size, 5 - at) for at in range(0, 5, batch_size)]
        np.testing.assert_allclose([value for some in found for value in some], expected, rtol=1e-6)


@torch.no_grad()
def test_a_memory_that_nothing_is_written_to_stays_at_its_start() -> None:
    model, tokens = build_model("lmm"), random_tokens(1, 16)
    with writes_left_out(model, torch.ones(1, 16, dtype=torch.bool)):
        state = model(tokens).state
    for core, layer in zip(memory_cores(model, ""), state.layers, strict=True):
        for weight, start in zip(layer.memory.memory.weights, core.learned(), strict=True):
            torch.testing.assert_close(weight[0], start, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_losses_of_one_token_and_of_rows() -> None:
    model, tokens = build_model("mag"), random_tokens(3, 12)
    assert token_losses(model, tokens[:, :1]).isnan().all()
    torch.testing.assert_close(token_losses(model, tokens)[1:2, 1:], token_losses(model, tokens[1:2])[:, 1:])
