"""Runs on every rank of test_plan_traffic.py: a training step of each recipe, and everything that it sends.

Arguments: OUTPUT RECIPE...; every rank writes, for each recipe, a line of JSON: lists of [kind, bytes, ranks].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import get_process_group_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.mesh import Mesh
from parallel.process import World, exit_now, initialize, shutdown
from pretrain.config import Recipe, load_recipe
from pretrain.loop import build_engine
from tests.parallel.worker_groups import leave_groups
from tools.bench.layout_rank import random_batches

KINDS = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
}
"""By torch's operators. What receives is counted where it is sent."""
IGNORED = ("recv_", "barrier")


class Sent(TorchDispatchMode):
    """What this rank sends, whoever calls: torch.distributed's functions all end in operators, which are seen here."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[str, int, list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name not in IGNORED:
                group = next(each for each in args if isinstance(each, torch.ScriptObject))
                ranks = get_process_group_ranks(torch.distributed.ProcessGroup.unbox(group))
                self.messages.append((KINDS[name], max(map(total_bytes, args)), ranks))
        return func(*args, **(kwargs or {}))


def total_bytes(argument: Any) -> int:
    """Of the tensors of an operator's argument. The largest argument is the whole of what the ranks share."""
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(total_bytes, argument)) if isinstance(argument, list | tuple) else 0


def sent_in_a_step(recipe: Recipe, world: World) -> list[tuple[str, int, list[int]]]:
    mesh = Mesh.build(world, recipe.parallel.layout(world.size))
    torch.manual_seed(0)
    engine = build_engine(recipe, recipe.batches(world.size), mesh)
    batches = random_batches(recipe, mesh)
    if recipe.parallel.zero_stage == 3:  # it learns in the first step which parameters are wanted when
        engine.train_step(batches, 1e-4)
    with Sent() as sent:
        result = engine.train_step(batches, 1e-4)
    assert not result.skipped
    engine.destroy()
    return sent.messages


def main() -> None:
    world = initialize("cpu")
    with Path(f"{sys.argv[1]}.{world.rank}").open("w") as output:
        for path in sys.argv[2:]:
            print(json.dumps(sent_in_a_step(load_recipe(Path(path)), world)), file=output, flush=True)
            leave_groups()
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main()
