"""Runs on every rank of test_tensor_parallel.py: models of every kind split over the ranks, against the whole, without
an engine, in float64. Arguments: OUTPUT CASE..., a case as in tests.model_cases, and with `SHARDED` behind it.
"""

from __future__ import annotations

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ModelState, TitansLM
from parallel.bad_states import StateGuard
from parallel.carried_states import CarriedStates
from parallel.distribute import distribute
from parallel.mesh import Layout, Mesh
from parallel.process import exit_now, initialize, shutdown
from parallel.slices import slice_of
from tests.model_cases import build_model, random_tokens
from tools.bench.live_tensors import LiveTensors

ROWS, LENGTH = 3, 24
SHARDED = ", sharded"
"""Behind a case: with the norms divided over the ranks."""


def build(case: str) -> TitansLM:
    return build_model(case, vocab_size=32, num_heads=4, dim=32)


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets of which some do not count, and a document that begins inside a row."""
    tokens = random_tokens(ROWS, LENGTH + 1)
    targets = tokens[:, 1:].clone()
    targets[0, :5] = targets[2, -1] = -100
    resets = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    resets[1, 16] = True
    return tokens[:, :-1], targets, resets


def run(model: TitansLM, cut: int = 14) -> tuple[Tensor, ModelState, dict[str, Tensor]]:
    """Two pieces, of `cut` tokens and the rest, with the state handed on, then backward: the loss, the state, and what
    state and loss gave the weights and, last, the gradient of the loss in the state between them.
    """
    tokens, targets, resets = rows()
    first = model(tokens[:, :cut], targets=targets[:, :cut])
    between = first.state.map(lambda x: x.detach().requires_grad_(x.is_floating_point()))
    second = model(tokens[:, cut:], between, targets=targets[:, cut:], resets=resets[:, cut:])
    second.loss_sum.backward()
    arriving = {name: leaf.grad for name, leaf in between.named_tensors() if leaf.grad is not None}
    state = sum((dict(first.state.named_tensors())[name] * grad).sum() for name, grad in arriving.items())
    (first.loss_sum + state).backward()
    return first.loss_sum.detach() + second.loss_sum.detach(), second.state.detach(), arriving


def largest(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.isfinite().all()  # max() passes over NaN
    if not expected.numel():
        return 0.0
    return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-3))


def part_of_heads(name: str, own: Tensor, whole: Tensor, mesh: Mesh) -> Tensor:
    """This rank's part of a whole state's tensor: along the axis whose length differs, where one does."""
    parts = mesh.tensor.size * mesh.sequence.size
    for axis, (short, long) in enumerate(zip(own.shape, whole.shape, strict=True)):
        if short != long:
            assert long == short * parts, name
            return whole.chunk(parts, axis)[mesh.tensor.index * mesh.sequence.size + mesh.sequence.index]
    return whole


def activation_bytes(model: TitansLM) -> int:
    """What operations have made of many tokens and a backward pass will read, behind the forward."""
    tokens = random_tokens(2, 64)
    with LiveTensors() as live:
        loss = model(tokens, targets=tokens).loss_sum
        held = live.bytes
        loss.backward()
    model.zero_grad()
    return held


@cache
def of_whole(case: str) -> tuple[TitansLM, Tensor, ModelState, dict[str, Tensor]]:
    """The whole model with its gradients, and what `run` gives of it."""
    model = build(case)
    return model, *run(model)


def compare(case: str, mesh: Mesh, *, shard_norms: bool) -> dict[str, float]:
    whole, loss, state, arriving = of_whole(case)
    own = build(case)
    distribute(own, mesh, shard_norms=shard_norms)
    assert [name for name, _ in own.named_parameters()] == [name for name, _ in whole.named_parameters()]
    activations = activation_bytes(own)
    own_loss, own_state, own_arriving = run(own)
    seen = {"loss": largest(own_loss, loss), "held": 0.0, "gradient": 0.0, "state": 0.0, "state_gradient": 0.0}
    seen["activations"] = activations
    expected = dict(whole.named_parameters())
    for name, parameter in own.named_parameters():
        cut = slice_of(parameter)
        gradient = expected[name].grad if cut is None else cut.of(expected[name].grad)
        seen["gradient"] = max(seen["gradient"], largest(parameter.grad, gradient))
        seen["held"] += parameter.numel() / whole.num_parameters()
    for name, tensor in own_state.named_tensors():
        expected_tensor = dict(state.named_tensors())[name]
        part = part_of_heads(name, tensor, expected_tensor, mesh)
        seen["state"] = max(seen["state"], largest(tensor.double(), part.double()))
    assert own_arriving.keys() == arriving.keys()
    for name, gradient in own_arriving.items():
        part = part_of_heads(name, gradient, arriving[name], mesh)
        seen["state_gradient"] = max(seen["state_gradient"], largest(gradient, part))
    tokens, targets, _ = rows()
    with torch.no_grad():
        seen["logits"] = largest(own(tokens).logits, whole(tokens).logits)
        scores, own_scores = (m(tokens, targets=targets, with_correct=True) for m in (whole, own))
        seen["scores"] = largest(own_scores.losses, scores.losses)
        seen["wrong"] = float((own_scores.correct != scores.correct).sum())
    return seen


def bad_rows(mesh: Mesh) -> list[list[int]]:
    """Which rows a guard has begin anew on this rank, and which it then finds so, where the last rank's heads alone are
    spoiled, in row 1.
    """
    model = build("lmm")
    distribute(model, mesh)
    state = {name: tensor.detach().clone() for name, tensor in model(rows()[0]).state.flat().items()}
    if mesh.tensor.index == mesh.tensor.size - 1:
        state["layers.1.memory.memory.weights.0"][1] = math.nan
    carried = CarriedStates(mesh, micro_batch_size=ROWS, accumulation=1)
    carried.put(0, state)
    return [StateGuard(carried, "reset").before_step(), carried.get(0)["restart"].nonzero().flatten().tolist()]


def main(output: str, cases: list[str]) -> None:
    world = initialize("cpu")
    torch.set_num_threads(1)
    mesh = Mesh.build(world, Layout(tensor=world.size))
    seen: dict[str, Any] = {"bad rows": bad_rows(mesh)}
    for case in cases:
        name = case.removesuffix(SHARDED)
        seen[case] = compare(name, mesh, shard_norms=case != name)
    Path(f"{output}.{world.rank}").write_text(json.dumps(seen))
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
