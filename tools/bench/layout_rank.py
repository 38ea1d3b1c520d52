"""`python -m tools.bench.layout_rank WORK OUTPUT`: a process of `tools.bench layouts`. It takes steps along one axis
after another, and writes what they spent their time on. WORK is JSON. With the launcher's variables it is one of two
ranks, without them it trains by itself.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.bandwidth import all_reduce_bandwidth
from parallel.mesh import Mesh
from parallel.process import World, exit_now, initialize, shutdown
from pretrain.config import Recipe, load_recipe
from pretrain.loop import build_engine
from tools.bench.long import model_config
from tools.bench.train import RandomBatch

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml"
RANKS = 2
AXES: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": RANKS},
    "tensor-sharded": {"tensor": RANKS, "tensor_shard_norms": True},
    "data": {},
    "sequence": {"sequence": RANKS},
    "pipeline": {"pipeline": RANKS},
}
"""What two ranks are laid out along, with the recipe's fields that say so."""
_COLLECTIVES = (
    "all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "all_gather", "all_gather_into_tensor",
    "all_gather_object", "all_to_all_single", "broadcast", "barrier",
)  # fmt: skip
_LINK_TIMES = 30
"""Messages are small, and what else runs makes one of them take many times as long."""
_HANDED_ON = ("recv",)
"""What a stage of a pipeline waits in for its turn."""


@dataclasses.dataclass
class Spent:
    """Seconds of this process since it began to count."""

    compute: float = 0.0
    """Of the processor, by this thread, outside of the other two: what else runs on the machine does not count."""
    collectives: float = 0.0
    bubble: float = 0.0


class Clock:
    """Counts the time of every collective and every receiving of this process, of our own and of DeepSpeed's. They must
    be waited for where they are called, as they are on a CPU. Made before DeepSpeed is imported: it keeps some of them.
    """

    def __init__(self) -> None:
        self._spent = Spent()
        for name in (*_COLLECTIVES, *_HANDED_ON):
            setattr(dist, name, self._counted(getattr(dist, name), "bubble" if name in _HANDED_ON else "collectives"))

    def now(self) -> tuple[float, ...]:
        """The clock's time, and what of it was spent on what, in the order of `Spent`."""
        spent = dataclasses.replace(self._spent, compute=self._spent.compute + time.thread_time())
        return (time.perf_counter(), *dataclasses.astuple(spent))

    def _counted(self, call: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start, computed = time.perf_counter(), time.thread_time()
            work = call(*arguments, **options)
            if work is not None and options.get("async_op"):
                work.wait()
            setattr(self._spent, kind, getattr(self._spent, kind) + time.perf_counter() - start)
            self._spent.compute -= time.thread_time() - computed
            return work

        return timed


def recipe_of(variant: str, *, axis: str | None, rows: int, length: int, **sizes: int) -> Recipe:
    """The recipe of a model of `tools.bench.long`'s sizes, by two ranks along an axis (None: by one). Micro-batches are
    of one row, so that a pipeline has several; with ZeRO 1 nothing is summed beside the backward pass.
    """
    training = {"sequence_length": length, "batch_tokens": rows * length, "micro_batch_size": 1}
    sections = {
        "model": model_config(variant, **sizes).model_dump(),
        "training": training | {"tokens": rows * length},
        "schedule": {"warmup_tokens": 0},
        "parallel": {"precision": "fp32", "device": "cpu"} | ({} if axis is None else AXES[axis]),
    }
    return load_recipe(RECIPE, [(name, json.dumps(fields)) for name, fields in sections.items()])


def random_batches(recipe: Recipe, mesh: Mesh) -> list[RandomBatch]:
    """This rank's micro-batches of a step of random tokens, which are the same in every layout."""
    training, vocabulary = recipe.training, recipe.model.vocab_size
    shape = (training.batch_tokens // training.sequence_length, training.sequence_length + 1)
    rows = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    own = rows.chunk(mesh.data.size)[mesh.data.index].split(training.micro_batch_size)
    return [RandomBatch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in own]


def measure(recipe: Recipe, world: World, clock: Clock, steps: int) -> dict[str, Any]:
    """Seconds of the fastest of `steps` steps behind another one, the means over this world's ranks; the last one's
    loss. All layouts read the same rows.
    """
    mesh = Mesh.build(world, recipe.parallel.layout(world.size))
    engine = build_engine(recipe, recipe.batches(world.size), mesh)
    batches = random_batches(recipe, mesh)
    found = []
    for number in range(1 + steps):
        dist.barrier()
        before = clock.now()
        loss = float(engine.train_step(batches, 1e-4).loss)
        after = clock.now()
        if number:  # the first allocates, and makes the connections
            found.append([late - early for late, early in zip(after, before, strict=True)])
    # What replicas sum once a step, or what other ranks hand each other in every layer.
    activations = recipe.training.sequence_length * recipe.model.dim
    message = 4 * (engine.num_parameters if mesh.data.size > 1 else activations)
    engine.destroy()
    means = torch.tensor(found, dtype=torch.float64)
    dist.all_reduce(means)
    seconds, compute, collectives, bubble = min((means / world.size).tolist())
    return {
        "seconds": seconds,
        "compute_s": compute,
        "collectives_s": collectives,
        "bubble_s": bubble,
        "loss": loss,
        "link_bytes_per_second": all_reduce_bandwidth(world.device, message, times=_LINK_TIMES),
    }


def main() -> None:
    """Measures along the axes that WORK lists; rank 0, or every process that is alone, writes."""
    work = json.loads(sys.argv[1])
    recipes = [recipe_of(work["variant"], axis=axis, **work["sizes"]) for axis in work["axes"]]
    torch.set_num_threads(1)
    clock, world = Clock(), initialize("cpu")
    found = [measure(recipe, world, clock, work["steps"]) for recipe in recipes]
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(found))
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main()
