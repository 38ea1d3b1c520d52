"""Rewriting a checkpoint's state files for another layout, so that each of its ranks reads a file of its own.

No run needs it: any layout reads what any other wrote. It spares a large one the reading of what its ranks do not hold.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from model import ModelConfig
from parallel.mesh import Layout
from parallel.rank_model import model_of_rank
from parallel.shares import Held, Share, shares
from parallel.slices import slice_of
from parallel.state_files import INDEX_FILE, StateReader, stream_rank, write_index
from pretrain.checkpoints import MANIFEST, FileEntries, finished_file, publish
from pretrain.errors import UserError
from pretrain.resume import read_trainer_state
from tools.checkpoint.contents import damage, read_model


def reshape(checkpoint: Path, output: Path, layout: Layout, zero_stage: int) -> Path:
    """Write the checkpoint again to `output`, its state files as ranks of `layout` hold it, a stretch of a parameter in
    memory at a time; complete or not at all.

    Raises:
        UserError: the checkpoint is not whole, the model has no such layout, or `output` is there or cannot be written.
    """
    if output.exists():
        raise UserError(f"{output}: is there already; give another --output")
    if found := damage(checkpoint):
        raise UserError(f"{checkpoint} is not whole: {'; '.join(found)}")
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


def _write(checkpoint: Path, folder: Path, layout: Layout, zero_stage: int) -> Iterator[Path]:
    config, cursor = read_model(checkpoint), read_trainer_state(checkpoint).cursor
    context = 1 if cursor is None else cursor.sequence_length
    with StateReader(checkpoint) as reader:

        def read(kind: str, share: Share) -> Tensor:
            return reader.read(kind, share.parameter, share.start, share.numel, share.part)

        for rank in range(layout.ranks):
            yield stream_rank(
                folder, rank, layout.ranks, rank_shares(config, layout, rank, zero_stage, context=context), read
            )
        step, shapes = reader.optimizer_step, reader.shapes
    yield write_index(folder, ranks=layout.ranks, optimizer_step=step, shapes=shapes, layout=layout)
    for path in sorted(checkpoint.iterdir()):
        if path.name not in (INDEX_FILE, MANIFEST) and not path.name.startswith("state-"):
            yield Path(shutil.copyfile(path, folder / path.name))


def rank_shares(config: ModelConfig, layout: Layout, rank: int, zero_stage: int, *, context: int) -> list[Share]:
    """What a rank of a layout is the one to write. Raises UserError where the model has no such layout.

    Args:
        context: tokens of a training row, which a pipeline's stages are balanced for.
    """
    try:
        model = model_of_rank(config, layout, rank, context=context)
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
