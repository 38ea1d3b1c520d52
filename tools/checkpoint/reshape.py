"""Rewriting a checkpoint's state files for another layout, so that each of its ranks reads a file of its own.

No run needs it: any layout reads what any other wrote. It spares a large one the reading of what its ranks do not hold.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from model import ModelConfig
from parallel.config import ParallelConfig
from parallel.layout_rules import require_layout
from parallel.mesh import Layout
from parallel.pipeline_stages import Balance
from parallel.rank_model import model_of_rank
from parallel.shares import Held, Share, shares
from parallel.slices import slice_of
from parallel.state_files import INDEX_FILE, StateReader, index_file, stream_rank
from pretrain.checkpoints import MANIFEST, FileEntries, publish
from pretrain.durable import finished_file
from pretrain.errors import UserError
from pretrain.phases import load_phases
from pretrain.resume import RECIPE_FILE, read_trainer_state
from tools.checkpoint.contents import damage, read_model


def reshape(checkpoint: Path, output: Path, layout: Layout, zero_stage: int) -> Path:
    """Write the checkpoint again to `output`, its state files as ranks of `layout` hold it, a stretch of a parameter in
    memory at a time; complete or not at all. Stages of a pipeline are balanced as the checkpoint's recipe says. All
    other files, states of streams' rows and generators among them, are copied as they are.

    Raises:
        UserError: the checkpoint is not whole, the model has no such layout, or not with that ZeRO stage, or `output`
            is there or cannot be written.
    """
    if output.exists():
        raise UserError(f"{output}: is there already; give another --output")
    if found := damage(checkpoint):
        raise UserError(f"{checkpoint} is not whole: {'; '.join(found)}")
    _require_layout(read_model(checkpoint), layout, zero_stage)
    partial = output.with_name(f".partial-{output.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files: FileEntries = {
            path.name: finished_file(path) for path in _write(checkpoint, partial, layout, zero_stage)
        }
        publish(partial, output, files)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output}: cannot be written: {error}; free space or give another --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _require_layout(config: ModelConfig, layout: Layout, zero_stage: int) -> None:
    """Raises UserError for what no training could have."""
    sizes = {"pipeline": layout.pipeline, "sequence": layout.sequence, "tensor": layout.tensor}
    try:
        # State files are fp32, whatever the model computes in.
        parallel = ParallelConfig(zero_stage=zero_stage, precision="fp32", **sizes)
        require_layout(parallel, config, lengths={})
    except ValidationError as error:
        reasons = (each["msg"].removeprefix("Value error, ") for each in error.errors())
        raise UserError("; ".join(reasons)) from None
    except ValueError as error:
        raise UserError(str(error)) from error


def _write(checkpoint: Path, folder: Path, layout: Layout, zero_stage: int) -> Iterator[Path]:
    config, state = read_model(checkpoint), read_trainer_state(checkpoint)
    recipe = load_phases(checkpoint / RECIPE_FILE)[len(state.done)].recipe
    context = recipe.training.sequence_length if state.cursor is None else state.cursor.sequence_length
    balance = recipe.parallel.balance_stages
    with StateReader(checkpoint) as reader:

        def read(kind: str, share: Share) -> Tensor:
            return reader.read(kind, share.parameter, share.start, share.numel, share.part)

        for rank in range(layout.ranks):
            held = rank_shares(config, layout, rank, zero_stage, context=context, balance=balance)
            yield stream_rank(folder, rank, layout.ranks, held, read)
        step, shapes = reader.optimizer_step, reader.shapes
    yield index_file(ranks=layout.ranks, optimizer_step=step, shapes=shapes, layout=layout).write(folder)
    for path in sorted(checkpoint.iterdir()):
        if path.name not in (INDEX_FILE, MANIFEST) and not path.name.startswith("state-"):
            yield Path(shutil.copyfile(path, folder / path.name))


def rank_shares(
    config: ModelConfig, layout: Layout, rank: int, zero_stage: int, *, context: int, balance: Balance = "flops"
) -> list[Share]:
    """What a rank of a layout is the one to write. Raises UserError where the model has no such layout.

    Args:
        context: tokens of a training row, which a pipeline's stages are balanced for.
        balance: what they have about as much of each.
    """
    try:
        model = model_of_rank(config, layout, rank, context=context, balance=balance)
    except ValueError as error:
        raise UserError(str(error)) from error
    decayed, parameters = model.decay_parameters(), list(model.named_parameters())
    groups = [
        [Held(name, slice_of(p), p.numel()) for name, p in parameters if (name in decayed) == decays]
        for decays in (True, False)
    ]
    place = layout.place(rank)
    replica, replicas = place.data * layout.sequence + place.sequence, layout.data * layout.sequence
    own = shares(groups, zero_stage=zero_stage, replica=replica, replicas=replicas)
    # The last stage steps a copy of the first one's tied embedding.
    left_out = {"embedding.weight"} if place.pipeline > 0 else set()
    return [s for s in own if (s.part is not None or place.tensor == 0) and s.parameter not in left_out]
