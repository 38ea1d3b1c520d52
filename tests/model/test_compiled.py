"""Compiled parts give the model that they are parts of: logits, states and gradients."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from model import TitansLM
from model.compiled import PARTS, compile_parts
from tests.model_cases import CASES, build_model, random_tokens


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model: TitansLM) -> list[Tensor]:
    """Logits of a row, and the gradients."""
    logits = model(random_tokens(2, 9)).logits
    return [logits, *torch.autograd.grad(logits.sin().sum(), list(model.parameters()))]


def in_pieces(model: TitansLM) -> list[Tensor]:
    """Logits of a row in two pieces and of a token behind them without gradient, and the gradients."""
    tokens = random_tokens(2, 17)
    first = model(tokens[:, :9])
    second = model(tokens[:, 9:16], first.state)
    logits = torch.cat((first.logits, second.logits), 1)
    gradients = torch.autograd.grad(logits.sin().sum(), list(model.parameters()), allow_unused=True)
    with torch.no_grad():
        token = model(tokens[:, 16:], second.state.detach()).logits
    return [logits, token, *(gradient for gradient in gradients if gradient is not None)]


def assert_compiled_is_the_same(
    case: str, backend: str, results: Callable[[TitansLM], list[Tensor]], **overrides: object
) -> None:
    model = build_model(case, **overrides)
    expected = results(model)
    compile_parts(model, backend)
    torch._dynamo.utils.counters.clear()
    for got, wanted in zip(results(model), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 2
    assert not counters["graph_break"], "a part is not one graph"


def test_a_traced_model_is_the_same() -> None:
    assert_compiled_is_the_same("mag", "aot_eager", whole, num_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mac", "mag-deep", "mal", "transformer-window"])
def test_a_compiled_model_is_the_same(case: str) -> None:
    assert_compiled_is_the_same(case, "inductor", in_pieces)


@pytest.mark.parametrize("case", CASES)
def test_parts_hold_no_module_whose_hooks_would_be_compiled_too(case: str) -> None:
    model = build_model(case)
    parts = [module for module in model.modules() if isinstance(module, PARTS)]
    assert parts
    assert not [name for part in parts for name, _ in part.named_children()]
