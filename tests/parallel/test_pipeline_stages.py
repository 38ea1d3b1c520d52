"""Dividing layers over stages, and the model cut to one of them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from parallel.pipeline_stages import cut_to_stage, divide_layers, receive, stage_layers
from tests.model_cases import build_model, random_tokens


def least(layers: int, stages: int, layer: float, first: float, last: float) -> float:
    """What the costliest stage costs in the best of all divisions."""
    costs = []
    for ends in combinations(range(1, layers), stages - 1):
        bounds = [0, *ends, layers]
        loads = [layer * (b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
        loads[0] += first
        loads[-1] += last
        costs.append(max(loads))
    return min(costs)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [4, 5, 9])
@pytest.mark.parametrize(("first", "last"), [(0.0, 0.0), (0.0, 2.5), (3.5, 3.5), (1.2, 9.0)])
def test_no_division_has_a_cheaper_costliest_stage(layers: int, stages: int, first: float, last: float) -> None:
    divided = divide_layers(layers, stages, layer=1.0, first=first, last=last)
    assert [index for held in divided for index in held] == list(range(layers))
    assert all(len(held) > 0 for held in divided)
    loads = [float(len(held)) for held in divided]
    loads[0] += first
    loads[-1] += last
    assert max(loads) == pytest.approx(least(layers, stages, 1.0, first, last))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel.pipeline is 5, but the model has 4 layers.*set it to 4 or less"):
        divide_layers(4, 5, layer=1.0)


def test_a_large_head_takes_the_place_of_layers() -> None:
    model = build_model("lmm", torch.float32, num_layers=6, vocab_size=400)
    by_flops, by_parameters = (stage_layers(model, 3, by, context=64) for by in ("flops", "parameters"))
    assert [len(held) for held in by_flops] == [2, 3, 1]
    assert [len(held) for held in by_parameters] == [1, 3, 2], "the embedding weighs, too"


@pytest.mark.parametrize("case", ["mac", "lmm", "transformer"])
def test_stages_one_behind_the_other_are_the_model(case: str) -> None:
    """Tied and untied heads; the state of a stage is that of its layers; every parameter is somewhere, once."""
    tokens = random_tokens(2, 12)
    whole = build_model(case, num_layers=4)
    expected = whole(tokens, targets=tokens, with_stats=True)
    stages = stage_layers(whole, 3, "flops", context=12)
    x, names, states, stats = None, [], {}, [{} for _ in range(4)]
    for index in range(3):
        model = build_model(case, num_layers=4)
        cut_to_stage(model, stages, index)
        if index > 0:
            receive(model, x)
        output = model(tokens, targets=tokens, with_stats=True)
        x = output.loss_sum
        names += [name for name, _ in model.named_parameters()]
        states |= output.state.flat()
        stats = [{**a, **b} for a, b in zip(stats, output.stats, strict=True)]
    torch.testing.assert_close(x, expected.loss_sum)
    tied = ["embedding.weight"] if whole.config.tie_embeddings else []
    assert sorted(names) == sorted([*(name for name, _ in whole.named_parameters()), *tied])
    torch.testing.assert_close(states, expected.state.flat())
    assert [layer.keys() for layer in stats] == [layer.keys() for layer in expected.stats]


def test_a_stage_does_not_run_twice_on_what_arrived_once() -> None:
    model = build_model("lmm", num_layers=2)
    cut_to_stage(model, [range(1), range(1, 2)], 1)
    tokens = random_tokens(1, 4)
    receive(model, torch.zeros(1, 4, 16, dtype=torch.float64))
    model(tokens, targets=tokens)
    with pytest.raises(RuntimeError, match="without the activations of the one before"):
        model(tokens, targets=tokens)
