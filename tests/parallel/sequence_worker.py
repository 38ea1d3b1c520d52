"""Runs on every rank of test_sequence_parallel.py: models whose rows are shared by the ranks, against one process,
without an engine, in float64. Arguments: OUTPUT TENSOR CASE...: so many tensor ranks, the others are sequence ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from parallel.distribute import distribute
from parallel.mesh import Layout, Mesh
from parallel.process import exit_now, initialize, shutdown
from parallel.sequence_parallel import HEADS, TOKENS, exchange
from parallel.slices import slice_of
from tests.parallel.tensor_worker import build, largest, part_of_heads, rows, run

CUT = 12


def compare(case: str, mesh: Mesh, *, checkpointing: bool, shard_norms: bool) -> dict[str, float]:
    whole, own = build(case), build(case)
    distribute(own, mesh, shard_norms=shard_norms)
    own.set_activation_checkpointing(checkpointing)
    assert [name for name, _ in own.named_parameters()] == [name for name, _ in whole.named_parameters()]
    group = mesh.sequence
    loss, state, arriving = run(whole, CUT)
    own_loss, own_state, own_arriving = run(own, CUT)
    seen = {"loss": largest(group.all_reduce(own_loss), loss), "gradient": 0.0, "state": 0.0, "state_gradient": 0.0}
    expected = dict(whole.named_parameters())
    for name, parameter in own.named_parameters():
        cut = slice_of(parameter)
        gradient = expected[name].grad if cut is None else cut.of(expected[name].grad)
        seen["gradient"] = max(seen["gradient"], largest(group.all_reduce(parameter.grad.clone()), gradient))
    states, tensors = dict(state.named_tensors()), dict(own_state.named_tensors())
    assert own_arriving.keys() == arriving.keys() and tensors.keys() == states.keys()
    for kind, of_own, of_whole in (("state", tensors, states), ("state_gradient", own_arriving, arriving)):
        for name, tensor in of_own.items():
            part = part_of_heads(name, tensor, of_whole[name], mesh)
            seen[kind] = max(seen[kind], largest(tensor.double(), part.double()))
    heads = next(tensor for name, tensor in tensors.items() if name.endswith((".k", "weights.0")))
    seen["heads"] = float(heads.shape[1 if heads.shape[1] < 4 else 2])
    tokens, targets, _ = rows()
    with torch.no_grad():
        seen["logits"] = largest(group.all_reduce(own(tokens).logits), whole(tokens).logits)
        scores, own_scores = (m(tokens, targets=targets, with_correct=True) for m in (whole, own))
        seen["scores"] = largest(group.all_reduce(own_scores.losses), scores.losses)
        seen["scores"] = max(seen["scores"], largest(group.all_reduce(own_scores.loss_sum), scores.loss_sum))
        seen["wrong"] = float((group.all_reduce(own_scores.correct.int()).bool() != scores.correct).sum())
        losses = group.all_reduce(own.token_losses(tokens, targets)[0])
        seen["scores"] = max(seen["scores"], largest(losses, scores.losses))
    return seen


def compare_exchange(mesh: Mesh) -> dict[str, float]:
    """There, and back again, by dtype: how many elements differ, forward, backward and twice backward."""
    group = mesh.sequence
    ranks, index = group.size, group.index
    seen = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        whole = torch.arange(2 * 3 * ranks * 2 * ranks * 5).reshape(2, 3 * ranks, 2 * ranks, 5).remainder(251).to(dtype)
        stretch, heads = whole.chunk(ranks, 1)[index], whole.chunk(ranks, 2)[index]
        x = stretch.clone().requires_grad_()
        y = exchange(x, group, HEADS, TOKENS)
        (gradient,) = torch.autograd.grad(y.square().sum() / 2, x, create_graph=True)  # x
        (second,) = torch.autograd.grad((gradient * 3).sum(), x)
        back = exchange(y, group, TOKENS, HEADS)
        wrong = (y != heads).sum() + (gradient != stretch).sum() + (second != 3).sum() + (back != stretch).sum()
        seen[str(dtype)] = float(wrong)
    return seen


def main(output: str, tensor: str, cases: list[str]) -> None:
    world = initialize("cpu")
    torch.set_num_threads(1)
    mesh = Mesh.build(world, Layout(tensor=int(tensor), sequence=world.size // int(tensor)))
    seen = {}
    for number, case in enumerate(cases):
        is_other, divides = number % 2 == 1, mesh.tensor.size > 1
        seen[case] = compare(case, mesh, checkpointing=is_other, shard_norms=divides and not is_other)
    seen["exchange"] = compare_exchange(mesh)
    Path(f"{output}.{world.rank}").write_text(json.dumps(seen))
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
