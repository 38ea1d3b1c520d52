"""The engine of a model whose layers are divided over the stages of a pipeline."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.boundary_states import State, open_boundary_states
from parallel.engine import Engine, Moved, mean_over_segments
from parallel.gradients import TIED_COPY
from parallel.loss_module import FlatState, LossModule, flattened, unflattened
from parallel.pipeline_links import Links
from parallel.pipeline_run import StageRun
from parallel.pipeline_stages import cut_to_stage, receive
from parallel.process import gather_objects
from parallel.scoring import PieceScores
from parallel.segments import Piece
from parallel.stage_clock import StageClock, bubble


class PipelineEngine(Engine):
    """An `Engine` whose ranks hold some layers each, and hand activations on; every rank reads the tokens of its rows.

    DeepSpeed's pipeline engine holds the stage: it sums the tied embedding's gradients and those of the replicas, takes
    the norm over all stages, and steps. The order of passes is `parallel.pipeline_schedule`'s.

    Args:
        stages: the layers of each stage (`parallel.pipeline_stages.stage_layers`).
    """

    def __init__(self, model: nn.Module, *arguments: Any, stages: list[range], **options: Any) -> None:
        self._stages = stages
        super().__init__(model, *arguments, **options)
        self._links = Links(self.mesh)

    def _held(self, model: nn.Module) -> nn.Module:
        cut_to_stage(model, self._stages, self.mesh.place.pipeline)
        held = set(model.parameters())
        for group in self._optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter in held]
        self._dim = model.config.dim
        return model

    def _wrapped(self) -> dict[str, Any]:
        topology = importlib.import_module("deepspeed.runtime.pipe.topology")
        pipe = importlib.import_module("deepspeed.runtime.pipe.module")
        importlib.import_module("deepspeed").init_distributed(verbose=False)  # finds the group that there is
        mesh, index = self.mesh, self.mesh.place.pipeline
        self._stage = LossModule(self.module)
        stage = pipe.PipelineModule(
            # Every stage is one layer to DeepSpeed, of which each rank builds its own.
            [self._stage if number == index else _held_elsewhere for number in range(len(self._stages))],
            topology=topology.PipeModelDataParallelTopology(len(self._stages), mesh.tensor.size, mesh.replicas.size),
            partition_method="uniform",
        )
        grid = stage.mpu()
        found = (grid.pp_group, grid.get_data_parallel_group_ranks(), grid.slice_group)
        if [list(ranks) for ranks in found] != [list(g.ranks) for g in (mesh.pipeline, mesh.replicas, mesh.tensor)]:
            raise RuntimeError(f"DeepSpeed lays {mesh.layout} out in another way: {found}")
        if self.module.config.tie_embeddings:
            self._tie(stage)
        return {"model": stage}

    def _tie(self, stage: Any) -> None:
        """Have the first and the last stage sum the gradients of the embedding that they share."""
        layout, last = self.mesh.layout, len(self._stages) - 1
        for ranks in layout.groups("pipeline"):
            ends = [ranks[0], ranks[last]]
            group = dist.new_group(ends)
            if self.world.rank in ends:
                tied = {"ranks": ends, "group": group, "weight_attr": ["weight"], "module": self.module.embedding}
                stage.tied_comms = {"embedding": tied}
                stage.tied_modules["embedding"] = self.module.embedding
                setattr(self.module.embedding.weight, TIED_COPY, self.world.rank == ends[1])

    def _run_micro_batches(
        self, batches: list[Moved], scale: Tensor, with_stats: bool
    ) -> tuple[list[Tensor], list[dict[str, Tensor]] | None]:
        cut, carried = self._segments, self.carried
        sequences = [[rows] if cut is None else cut.cut(*rows) for rows in batches]
        place = ("device", None) if cut is None else (cut.boundary_states, cut.folder)
        clock = StageClock(self.world.device)
        with open_boundary_states(*place) as boundaries:
            result = StageRun(
                self._links,
                self._forward_stage,
                self._empty_activations,
                sequences,
                [{} if carried is None else carried.get(index) for index in range(len(batches))],
                boundaries,
                clock,
                scale=scale,
                truncate_every=None if cut is None else cut.truncate_every,
                with_stats=with_stats,
                keeps_states=carried is not None,
            ).run()
        for index, state in enumerate(result.states):
            carried.put(index, state)
        losses = result.losses or [torch.zeros((), device=self.world.device) for _ in batches]
        self._spoil_unless_finite(losses)
        if not with_stats:
            return losses, None
        self._bubble = bubble(gather_objects(clock.seconds()))
        return losses, mean_over_segments(result.asides)

    def _forward_stage(
        self, arrived: Tensor | None, piece: Piece, state: State, with_stats: bool
    ) -> tuple[Tensor, State, Any]:
        if arrived is not None:
            receive(self.module, arrived)
        tokens, targets, resets = piece
        # A state comes back where one is given alone; whole rows that carry nothing need none.
        before = None if self._segments is None and self.carried is None else flattened(state)
        output, stats, _, after = self._stage(tokens, targets, with_stats, False, before, resets)
        return output, {} if after is None else unflattened(after), stats

    def _empty_activations(self, piece: Piece) -> Tensor:
        rows, length = piece[0].shape
        shape = (rows, length // self.config.stretches, self._dim)  # where ranks hold stretches, each sends its own
        return torch.empty(shape, dtype=next(self.module.parameters()).dtype, device=self.world.device)

    def _spoil_unless_finite(self, losses: list[Tensor]) -> None:
        """DeepSpeed leaves out a step whose gradient is not finite, and does not look at the loss."""
        finite = torch.isfinite(torch.stack(losses)).all().float()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        gradients = (getattr(parameter, "_hp_grad", parameter.grad) for parameter in self.module.parameters())
        gradient = next(gradient for gradient in gradients if gradient is not None)
        gradient.mul_(torch.where(finite > 0, 1.0, torch.nan).to(gradient.dtype))

    def _own_layers(self) -> range:
        return self._stages[self.mesh.place.pipeline]

    def _optimizer_step(self) -> None:
        self._engine._exec_reduce_tied_grads()
        self._engine._exec_reduce_grads()
        super()._optimizer_step()

    def _step_deepspeed(self) -> None:
        self._engine._exec_optimizer_step()

    def _read(self, rows: Moved, before: FlatState | None, with_scores: bool) -> tuple[PieceScores, FlatState | None]:
        tokens, targets, resets = rows
        if not self._links.is_first:
            receive(self.module, self._links.receive_activations(self._empty_activations(rows)))
        asked = with_scores and self._links.is_last
        output, _, scores, after = self._stage(tokens, targets, False, asked, before, resets)
        if self._links.is_last:
            return PieceScores(output, *((None, None) if scores is None else scores)), after
        self._links.send_activations(output)
        nothing = torch.zeros(targets.shape, device=self.world.device)
        return PieceScores(nothing.sum(), nothing, nothing.bool()), after

    def destroy(self) -> None:
        self._links.close()
        super().destroy()


def _held_elsewhere(activations: Tensor) -> Tensor:
    raise RuntimeError("a stage of a pipeline was run where it is not")
