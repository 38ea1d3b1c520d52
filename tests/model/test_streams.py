"""Queries, keys and values are projected again in the backward, where nothing but they would see it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.memory import Stream
from model.resets import find_resets
from tools.bench.live_tensors import LiveTensors

ROWS, TOKENS, DIM, HEADS, WIDTH = 2, 40, 8, 2, 4


class OtherMap(nn.Linear):
    """What an adapter puts in a projection's place: here with dropout, that recomputing would draw again."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5)


class Exchange(nn.Module):
    """Where sequence ranks would talk."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1


def with_other_map(stream: Stream) -> None:
    own = stream.project.weight
    stream.project = OtherMap(DIM, DIM, bias=False)
    stream.project.weight = own


OTHERS: dict[str, Callable[[Stream], object]] = {
    "a hook before it": lambda stream: stream.project.register_forward_pre_hook(lambda *_: None),
    "a hook behind it": lambda stream: stream.project.register_forward_hook(lambda *_: None),
    "a hook of gradients": lambda stream: stream.project.register_full_backward_hook(lambda *_: None),
    "a hook on the way to heads": lambda stream: stream.to_heads.register_forward_hook(lambda *_: None),
    "an exchange between ranks": lambda stream: setattr(stream, "to_heads", Exchange()),
    "another map": with_other_map,
    "another forward": lambda stream: setattr(stream.project, "forward", stream.project.forward),
}


def build() -> tuple[Stream, Tensor, Tensor]:
    """A stream, tokens and a convolution's tail, float64."""
    torch.manual_seed(0)
    stream = Stream(DIM, HEADS, WIDTH, normalize=True).double()
    x, tail = (torch.randn(ROWS, n, DIM, dtype=torch.float64, requires_grad=True) for n in (TOKENS, WIDTH - 1))
    return stream, x, tail


def gradients(outputs: tuple[Tensor, Tensor], sources: list[Tensor], **options: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(y.sin().sum() for y in outputs), sources, **options)


@pytest.fixture
def projections(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of all linear maps, as they are called."""
    seen, plain = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: seen.append(x) or plain(x, *rest))
    return seen


@pytest.mark.parametrize("begins", [None, 7])
def test_what_is_projected_again_has_the_gradients_of_the_plain_expression(begins, projections) -> None:
    stream, x, tail = build()
    resets = None
    if begins is not None:
        mask = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
        mask[1, begins] = True
        resets = find_resets(mask, None, torch.device("cpu"))
    sources = [x, tail, *stream.parameters()]
    expected = gradients(stream._shape(stream.project(x), None, tail, resets), sources)
    del projections[:]
    outputs = stream(x, tail, resets)
    assert len(projections) == 1
    for got, wanted in zip(gradients(outputs, sources), expected, strict=True):
        assert torch.equal(got, wanted)
    assert len(projections) == 2


@pytest.mark.parametrize("other", OTHERS)
def test_what_something_else_would_see_twice_is_projected_once(other: str, projections) -> None:
    stream, x, tail = build()
    sources = [x, tail, *stream.parameters()]
    OTHERS[other](stream)
    torch.manual_seed(1)
    expected = gradients(stream._shape(stream.to_heads(stream.project(x)), None, tail, None), sources)
    torch.manual_seed(1)
    del projections[:]
    outputs = stream(x, tail, None)
    for got, wanted in zip(gradients(outputs, sources), expected, strict=True):
        assert torch.equal(got, wanted)
    assert len(projections) == 1


def test_projected_tokens_are_not_kept_for_the_backward() -> None:
    kept = []
    for change in (lambda stream: None, OTHERS["a hook behind it"]):
        stream, x, tail = build()
        change(stream)
        with LiveTensors() as live:
            outputs = stream(x, tail, None)
            kept.append(live.bytes)
        assert outputs[0].requires_grad
    assert kept[1] - kept[0] == x.numel() * x.element_size()


@pytest.mark.parametrize("other", ["projected again", "a hook behind it"])
@pytest.mark.parametrize("name", ["project.weight", "convolution.weight"])
def test_a_weight_that_changes_before_the_backward_is_noticed(name: str, other: str) -> None:
    stream, x, tail = build()
    OTHERS.get(other, lambda stream: None)(stream)
    outputs = stream(x, tail, None)
    with torch.no_grad():
        stream.get_parameter(name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(outputs, [x])


@pytest.mark.parametrize("other", ["projected again", "a hook behind it"])
def test_weights_of_a_functional_call_are_those_of_its_backward(other: str) -> None:
    stream, x, tail = build()
    OTHERS.get(other, lambda stream: None)(stream)
    weights = {name: torch.randn_like(weight).requires_grad_() for name, weight in stream.named_parameters()}
    found = gradients(functional_call(stream, weights, (x, tail, None)), [x, tail, *weights.values()])
    with torch.no_grad():
        for name, weight in stream.named_parameters():
            weight.copy_(weights[name])
    expected = gradients(stream(x, tail, None), [x, tail, *stream.parameters()])
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)
