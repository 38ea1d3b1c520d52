"""Whole checkpoints of a small MAC, as ranks of any layout write them, without training one."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig
from parallel.mesh import Layout
from parallel.slices import Slice
from parallel.state_files import KINDS, Stretch, index_file, rank_file
from parallel.watchdog import Watchdog
from pretrain.checkpoints import checkpoint_name, publish
from pretrain.config import load_recipe
from pretrain.data import Cursor
from pretrain.durable import finished_file
from pretrain.phases import Phases
from pretrain.resume import MODEL_FILE, RECIPE_FILE, TRAINER_FILE, TrainerState
from tests.training_cases import write_recipe
from tools.checkpoint.contents import parameter_shapes

STEP = 7
ROWS = ("embedding.weight",)
"""Parameters that tensor ranks hold slices of, in these checkpoints."""


class NoWatchdog(Watchdog):
    """Watches nothing: what a real one sets up would end a test's process later, and hangs behind a fork."""

    def __init__(self) -> None:
        super().__init__(0.0, rank=0, ranks=1)

    def feed(self, doing: str) -> None:
        pass


def small_model(run: Path, **fields: Any) -> ModelConfig:
    """The model of the recipe below `run`."""
    return load_recipe(write_recipe(run / "shards", run, **fields)).model


shapes_of = cache(parameter_shapes)


def value_of(config: ModelConfig, name: str, kind: str) -> Tensor:
    """What a checkpoint holds of a parameter."""
    seed = sum(name.encode()) + 1000 * KINDS.index(kind)
    return torch.randn(shapes_of(config)[name], generator=torch.Generator().manual_seed(seed))


def make_checkpoint(run: Path, layout: Layout, **fields: Any) -> Path:
    """A checkpoint of a run, its parameters cut as tensor ranks would some of them, and shared among replicas."""
    recipe = load_recipe(write_recipe(run / "shards", run, **fields))
    shapes = shapes_of(recipe.model)
    final = run / "checkpoints" / checkpoint_name(STEP)
    partial = final.with_name(".partial")
    partial.mkdir(parents=True)
    replicas = layout.ranks // layout.tensor
    written = []
    for replica, index in itertools.product(range(replicas), range(layout.tensor)):
        stretches = []
        for name, kind in itertools.product(shapes, KINDS):
            is_cut = name in ROWS and layout.tensor > 1
            part = Slice(0, index, layout.tensor) if is_cut else None
            whole = value_of(recipe.model, name, kind)
            values = (whole if part is None else part.of(whole)).flatten()
            share = -(-len(values) // replicas)
            own = values[replica * share : (replica + 1) * share]
            if len(own) and (is_cut or index == 0):
                stretches.append(Stretch(kind, name, replica * share, own, part))
        written.append(rank_file(replica * layout.tensor + index, layout.ranks, stretches).write(partial))
    written.append(index_file(ranks=layout.ranks, optimizer_step=STEP, shapes=shapes, layout=layout).write(partial))
    cursor = Cursor(position=28, sequence_length=32, seed=0, order="rows", fingerprint="0123456789abcdef")
    state = TrainerState(
        step=STEP, tokens=128 * STEP, cursor=cursor, skipped_steps=1, tokenizer_sha256="ab12", ranks=layout.ranks
    )
    texts = {
        RECIPE_FILE: Phases.alone(recipe).to_yaml(),
        MODEL_FILE: recipe.model.model_dump_json(),
        TRAINER_FILE: state.model_dump_json(),
    }
    for name, text in texts.items():
        (partial / name).write_text(text)
        written.append(partial / name)
    publish(partial, final, {path.name: finished_file(path) for path in written})
    return final
