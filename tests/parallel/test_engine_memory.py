"""An engine that was destroyed leaves the memory of its tensors to the next."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from model import ModelConfig, TitansLM
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.process import World, initialize, shutdown
from pretrain.data import Batch


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield initialize("cpu")
    shutdown()


def live_bytes() -> int:
    """What all tensors that Python knows of hold, each storage once; those that a compiler traced with hold nothing."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_of_a_destroyed_engine_is_left(world: World, stage: int) -> None:
    before = live_bytes()
    model = TitansLM(ModelConfig.preset("transformer-tiny", vocab_size=64))
    engine = Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        ParallelConfig(zero_stage=stage, precision="fp32", device="cpu"),
        world,
        micro_batch_size=1,
        accumulation=1,
        gradient_clip=1.0,
    )
    del model
    size = 4 * engine.num_parameters
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    engine.train_step([Batch(tokens, tokens)], 1e-3)
    assert live_bytes() - before > 3 * size, "weights and both moments"
    engine.destroy()
    del engine
    assert live_bytes() - before < size / 10
