"""Builds, uses and destroys an engine for each ZeRO stage that is named, and prints what tensors hold meanwhile."""

from __future__ import annotations

import gc
import json
import sys

import torch

from model import ModelConfig, TitansLM
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.mesh import Mesh
from parallel.process import World, exit_now, initialize, shutdown
from pretrain.data import Batch


def live_bytes() -> int:
    """What all tensors that Python knows of hold, each storage once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


def measure(world: World, stage: int) -> dict[str, int]:
    """Bytes of the parameters, and what was held over the bytes before: by the engine, and after it."""
    before = live_bytes()
    model = TitansLM(ModelConfig.preset("transformer-tiny", vocab_size=64))
    engine = Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        ParallelConfig(zero_stage=stage, precision="fp32", device="cpu"),
        Mesh.data_parallel(world),
        micro_batch_size=1,
        accumulation=1,
        gradient_clip=1.0,
    )
    del model
    size = 4 * engine.num_parameters
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    engine.train_step([Batch(tokens, tokens)], 1e-3)
    held = live_bytes() - before
    engine.destroy()
    del engine
    return {"stage": stage, "size": size, "held": held, "left": live_bytes() - before}


if __name__ == "__main__":
    rows = []
    for stage in map(int, sys.argv[1:]):  # each in a world of its own
        rows.append(measure(initialize("cpu"), stage))
        shutdown()
    print(json.dumps(rows))
    exit_now(0)
