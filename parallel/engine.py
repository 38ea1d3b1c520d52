"""The engine that the training loop drives: step, evaluate, save, load. Nothing outside this folder knows that it
is DeepSpeed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import ModelState
from model.memory import mean_statistics
from parallel.bad_states import Mended, OnBadState, StateGuard
from parallel.boundary_states import State, open_boundary_states
from parallel.carried_states import CarriedStates
from parallel.config import ParallelConfig
from parallel.deepspeed_config import deepspeed_config
from parallel.deepspeed_groups import DeepSpeedGroups, forget_groups
from parallel.deepspeed_import import import_deepspeed
from parallel.fragments import Fragment, fragments, optimizer_step, spread_masters
from parallel.gradients import GradientWatch, clip_gradients, mean_over
from parallel.host_copies import HostCopies, SavedFile
from parallel.loss_module import FlatState, LossModule, flattened, unflattened
from parallel.mesh import Mesh
from parallel.process import gather_objects
from parallel.reduction import reduced_once, sum_in_fp32
from parallel.saved_state import files_of_state, read_state, read_weights
from parallel.scoring import IGNORED, Batch, PieceScores, Scored, score
from parallel.segments import Segments, run_segments
from parallel.state_files import WeightReader
from parallel.step_gate import Limits, StepGate
from parallel.whole_parameters import gather_parameters, whole_shapes

Moved = tuple[Tensor, Tensor, Tensor | None]
"""A batch's tokens and targets on the device, and its resets."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw, summed over all ranks. The tensors are fp32, 0-d; loss and norm are on the host, but
    for those of a step that was skipped, all others on the device: reading them waits for it.
    """

    loss: Tensor
    """Mean over the step's tokens that count, in nats; 0 where none does."""

    grad_norm: Tensor
    """Global l2 norm of the mean gradient, before clipping; inf or nan where it is not finite."""

    tokens: Tensor
    """Targets that counted (int64)."""

    stats: list[dict[str, Tensor]] | None
    """A dict for each layer, averaged over ranks, of the last micro-batch; None unless asked for."""

    skipped: bool = False
    """Whether loss or gradient was not finite: then weights and optimizer are as they were before the step."""

    bad_rows: tuple[int, ...] = ()
    """Of a skipped step, the rows of all ranks that are in micro-batches whose loss is not finite: row j of micro-batch
    m of data rank r is number (m * data ranks + r) * micro_batch_size + j of the step."""

    held_back: bool = False
    """Whether loss or gradient norm was above its limit: then too weights and optimizer are as they were."""

    reset_rows: tuple[int, ...] = ()
    """Rows of all ranks whose carried state was not finite, before the step or behind it, and begins anew."""

    rolled_back_rows: tuple[int, ...] = ()
    """Those whose state the step spoiled, and which go on from the one before it."""

    bubble: float | None = None
    """Of a pipeline, with `stats`: how long stages stood idle, over the time of their forward and backward passes."""

    @property
    def mended_rows(self) -> tuple[int, ...]:
        """Rows of all ranks whose carried state was not finite."""
        return tuple(sorted({*self.reset_rows, *self.rolled_back_rows}))


class Engine:
    """A model, its optimizer and its place among the ranks.

    The loss convention is one for every layout: a rank's loss is its token sum times the replicas of the model over
    the tokens of the whole step, so that DeepSpeed's mean over replicas is the mean over tokens, whatever their shares.

    Args:
        model: takes (tokens [B, T], targets=[B, T], with_stats=bool, with_correct=bool) and returns an output with
            `.loss_sum` and `.stats`, and `.correct` and `.losses` with with_correct; of batches that have them also
            resets=[B, T]. Where tensor ranks share it, this rank's part of it (`parallel.distribute`).
        optimizer: AdamW over the model's parameters. Its groups keep their weight decay; the learning rate comes
            with each step.
        accumulation: micro-batches of a step.
        gradient_clip: largest global gradient norm; 0.0 turns clipping off.
        segments: how rows are cut, for a model that also takes a `ModelState` and gives it as `.state`; None: each
            micro-batch is run whole.
        carry_state: whether each row of a step goes on from the same row of the step before, for such a model: with the
            values of its state, not the gradient.
        on_bad_state: what a row does whose carried state is not finite (`parallel.bad_states`).

    Raises:
        ValueError: the model has state that checkpoints would lose (persistent buffers).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        config: ParallelConfig,
        mesh: Mesh,
        *,
        micro_batch_size: int,
        accumulation: int,
        gradient_clip: float,
        segments: Segments | None = None,
        carry_state: bool = False,
        on_bad_state: OnBadState = "reset",
    ) -> None:
        _require_no_buffers(model)
        self.mesh, self.world = mesh, mesh.world
        self.config = config
        self.accumulation = accumulation
        self.shapes = whole_shapes(model)
        self.num_parameters = sum(shape.numel() for shape in self.shapes.values())
        self._clip = gradient_clip
        self._segments = segments
        self.carried = None
        """What rows carry into the next step; None where they carry nothing."""
        if carry_state:
            sizes = {"micro_batch_size": micro_batch_size, "accumulation": accumulation}
            self.carried = CarriedStates(mesh, **sizes, layers=self._own_layers())
        self._guard = None if self.carried is None else StateGuard(self.carried, on_bad_state)
        self._optimizer = optimizer
        self._watch: GradientWatch | None = None
        self._is_watched = False
        self._norm: Tensor | None = None
        self._micro_batch_size = micro_batch_size
        self._gate = StepGate()
        self._skipped = False
        self._bubble: float | None = None
        self._finite = torch.ones((), device=self.world.device)
        deepspeed = import_deepspeed(self.world.device)
        forget_groups(deepspeed)
        passes = accumulation * (1 if segments is None else segments.count)
        self._reduces_at_end = config.zero_stage == 3 and config.keeps_gradients_whole(passes)
        settings = deepspeed_config(
            config,
            micro_batch_size=micro_batch_size,
            accumulation=passes,
            data_ranks=mesh.replicas.size,
            gradient_clip=gradient_clip,
            num_parameters=self.num_parameters,
            on_gpu=self.world.device.type == "cuda",
        )
        self.module = self._held(model).to(self.world.device)
        """What this rank holds of the model. Under ZeRO 3 its parameters are empty outside its forward."""
        with contextlib.redirect_stdout(io.StringIO()):  # its optimizers and pipelines print tables
            self._engine, *_ = deepspeed.initialize(optimizer=optimizer, config=settings, **self._wrapped())
        if config.zero_stage > 0:
            self._gate.attach(self._engine.optimizer)
        self._backward_passes, self._passes_left = passes, 0
        if self._reduces_at_end:
            sum_in_fp32(self.module.parameters())

    def train_step(
        self,
        batches: Sequence[Batch],
        learning_rate: float,
        *,
        with_stats: bool = False,
        skip_above: Limits | None = None,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches. Every rank calls it.

        A step whose loss or gradient is not finite is skipped: weights, moments and the optimizer's count of steps stay
        bit for bit what they were. So is one whose loss or gradient norm is above `skip_above`, which is alike on all
        ranks. All ranks agree.

        Raises:
            ValueError: not `accumulation` micro-batches, or (first step) a parameter that no gradient reaches.
        """
        if len(batches) != self.accumulation:
            raise ValueError(f"a step takes {self.accumulation} micro-batches, got {len(batches)}")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        moved = [self._to_device(batch) for batch in batches]
        tokens = torch.stack([(targets != IGNORED).sum() for _, targets, _ in moved]).sum()
        self.mesh.data.all_reduce(tokens)
        scale = self.mesh.replicas.size / tokens.clamp(min=1).to(torch.float32)
        self._finite = torch.ones((), device=self.world.device)
        reset = [] if self._guard is None else self._guard.before_step()
        if not self._is_watched and optimizer_step(self._optimizer) == 0:
            self._watch, self._is_watched = GradientWatch(self.module), True
        losses, stats = self._run_micro_batches(moved, scale, with_stats)
        loss_sum = sum(losses, start=torch.zeros((), dtype=torch.float32, device=self.world.device))
        for group in (self.mesh.replicas, self.mesh.pipeline):
            group.all_reduce(loss_sum)
        loss = loss_sum / tokens.clamp(min=1)
        self._gate.begin(loss, skip_above)
        self._optimizer_step()
        mended = Mended([], []) if self._guard is None else self._guard.after_step([resets for *_, resets in moved])
        carried = (reset + mended.begun_anew, mended.rolled_back)
        reset_rows, rolled_back_rows = ((), ()) if self._guard is None else self._of_all_ranks(*carried)
        norm = self._norm
        if self._gate.seen is not None and not self._skipped:
            loss, norm = self._gate.seen
        elif norm is None:
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)
        return StepResult(
            loss=loss,
            grad_norm=norm.detach(),
            tokens=tokens,
            stats=None if stats is None else mean_over(self.mesh, stats),
            skipped=self._skipped,
            bad_rows=self._of_all_ranks(self._rows_of_bad(losses))[0] if self._skipped else (),
            held_back=self._gate.held_back,
            reset_rows=reset_rows,
            rolled_back_rows=rolled_back_rows,
            bubble=self._bubble if with_stats else None,
        )

    def evaluate(
        self,
        batches: Iterable[Batch],
        *,
        with_correct: bool = False,
        piece: int | None = None,
        by_position: bool = False,
        reset_window: int | None = None,
    ) -> Scored:
        """Score all ranks' batches, each from a beginning, without learning from them. Every rank calls it; ranks may
        have different numbers of batches.

        Args:
            with_correct: also count the targets that have the largest logit.
            piece: most tokens of a row that are read at a time, the state handed on; None: whole rows.
            by_position: also give the loss by position (`parallel.scoring`).
            reset_window: by_position also with the memory reset every so many tokens.
        """
        asked = with_correct or by_position

        def read(rows: Batch, state: ModelState | None, more: bool) -> tuple[PieceScores, Any]:
            before = None if state is None and not more else flattened({} if state is None else state.flat())
            scores, after = self._read(self._to_device(rows), before, asked)
            return scores, ModelState.from_tensors(unflattened(after)) if more else None

        self._engine.eval()
        scored = score(
            batches, read, self.mesh,
            piece=piece, with_correct=with_correct, by_position=by_position, reset_window=reset_window,
            stretches=self.config.stretches,
        )  # fmt: skip
        self._engine.train()
        return scored

    def files(self, copies: HostCopies | None = None) -> list[SavedFile]:
        """This rank's share of weights and optimizer state, and what its rows carry, as files to be written; every rank
        calls it. They are synced, renamed and agreed upon by `pretrain.checkpoints`.

        Args:
            copies: where the values are copied to, so that the files may be written while steps are taken, behind
                `copies.wait()`; None: they must be written before the next step.
        """
        files = files_of_state(
            self._fragments(), self._optimizer, self.mesh,
            zero_stage=self.config.zero_stage, shapes=self.shapes, copies=copies,
        )  # fmt: skip
        if self.carried is not None:
            files.append(self.carried.file())
        return files

    def save(self, folder: Path) -> list[Path]:
        """Write the files into `folder` now; every rank calls it. Returns their paths. Raises OSError or
        SafetensorError.
        """
        return [file.write(folder) for file in self.files()]

    def load(self, folder: Path, *, with_carried: bool = True) -> None:
        """Take over weights and optimizer state that any layout saved, and what rows carry; every rank calls it.

        Learning rate, weight decay and clipping stay those of this engine.

        Args:
            with_carried: False for rows that begin anew, whatever rows of the saved run carried.

        Raises:
            ValueError: the folder is not whole, holds another model, or not the states that this engine's rows carry.
        """
        read_state(folder, self._fragments(), self._optimizer, self.mesh, self.shapes)
        spread_masters(self._engine.optimizer, self.config.zero_stage)
        if self.carried is not None and with_carried:
            self.carried.read(folder)
        elif self.carried is not None:
            self.carried.clear()

    def load_weights(self, reader: WeightReader) -> None:
        """Take over weights alone, to begin from them; every rank calls it.

        Raises:
            ValueError: they are another model's.
        """
        read_weights(reader, self._fragments(), self._optimizer, self.shapes)
        spread_masters(self._engine.optimizer, self.config.zero_stage)

    def full_parameters(self) -> dict[str, Tensor]:
        """Every parameter, whole, fp32, on the CPU of rank 0 (an empty dict elsewhere). Every rank calls it."""
        held = {fragment.parameter: fragment for fragment in self._fragments()}
        return gather_parameters(
            self.module, self.shapes, held, self._optimizer.state, self.config.zero_stage, self.mesh
        )

    def destroy(self) -> None:
        """Let go of hooks and buffers, so that another engine can be built in this process. Its tensors are free when
        nobody holds the engine and the garbage collector has run.
        """
        self._engine.destroy()
        if self.config.zero_stage == 3:
            # It leaves the model at the bottom of this list, and ties parameters to the optimizer in cycles through
            # autograd's nodes, which the collector does not see.
            importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK.clear()
            for parameter in self.module.parameters():
                vars(parameter).clear()

    def _held(self, model: nn.Module) -> nn.Module:
        """What this rank holds of the model."""
        return model

    def _wrapped(self) -> dict[str, Any]:
        """The model as DeepSpeed takes it, and its groups."""
        groups = DeepSpeedGroups(self.mesh) if self.mesh.tensor.size > 1 else None
        return {"model": LossModule(self.module), "mpu": groups}

    def _read(self, rows: Moved, before: FlatState | None, with_scores: bool) -> tuple[PieceScores, FlatState | None]:
        """Score a piece of rows behind the state before it; the state behind it, where one was given."""
        tokens, targets, resets = rows
        loss, _, scores, after = self._engine(tokens, targets, with_scores=with_scores, before=before, resets=resets)
        return PieceScores(loss, *((None, None) if scores is None else scores)), after

    def _run_micro_batches(
        self, batches: list[Moved], scale: Tensor, with_stats: bool
    ) -> tuple[list[Tensor], list[dict[str, Tensor]] | None]:
        """All of a step's forward and backward passes: the sum of losses of each micro-batch, and the last one's
        statistics if asked for.
        """
        losses: list[Tensor] = []
        stats: list[dict[str, Tensor]] | None = None
        self._passes_left = self._backward_passes
        with reduced_once(self._engine) if self._reduces_at_end else contextlib.nullcontext():
            for index, rows in enumerate(batches):
                of_last = with_stats and index == len(batches) - 1
                loss, stats = self._forward_and_backward(index, rows, scale, of_last)
                losses.append(loss)
        return losses, stats

    def _forward_and_backward(
        self, index: int, rows: Moved, scale: Tensor, with_stats: bool
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        """A micro-batch, whole or by segments: its sum of losses, and its layers' statistics if asked for."""
        carried = None if self.carried is None else self.carried.get(index)
        if self._segments is None:
            inputs, targets, resets = rows
            before = None if carried is None else flattened(carried)
            loss, stats, _, after = self._engine(inputs, targets, with_stats, False, before, resets)
            self._backward(loss * scale)
            loss = loss.detach()
        else:
            loss, stats, after = self._run_segments(self._segments, rows, carried, scale, with_stats)
        if self.carried is not None:
            self.carried.put(index, unflattened(after))
        return loss, stats

    def _run_segments(
        self, segments: Segments, rows: Moved, carried: State | None, scale: Tensor, with_stats: bool
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None, FlatState]:
        def forward(tokens: Tensor, targets: Tensor, resets: Tensor | None, state: State) -> tuple[Tensor, State, Any]:
            asked = with_stats and torch.is_grad_enabled()
            loss, stats, _, after = self._engine(tokens, targets, asked, False, flattened(state), resets)
            return loss, unflattened(after), stats

        with open_boundary_states(segments.boundary_states, segments.folder) as boundaries:
            result = run_segments(
                segments.cut(*rows),
                forward,
                self._backward,
                boundaries=boundaries,
                scale=scale,
                state=carried,
                truncate_every=segments.truncate_every,
            )
        stats = mean_over_segments(result.asides) if with_stats else None
        return result.loss_sum, stats, flattened(result.state)

    def _backward(self, loss: Tensor) -> None:
        """One of the step's backward passes."""
        self._finite = self._finite * torch.isfinite(loss.detach())
        self._passes_left -= 1
        if self._passes_left == 0:
            # DeepSpeed leaves out a step whose gradient is not finite, and does not look at the loss.
            dist.all_reduce(self._finite, op=dist.ReduceOp.MIN)
            loss = loss * torch.where(self._finite > 0, 1.0, torch.nan)
        # The convention already divides by the whole step's tokens, so DeepSpeed must not divide by the
        # accumulation again.
        self._engine.backward(loss, scale_wrt_gas=False)
        if self._passes_left > 0 and not self._reduces_at_end:
            self._engine.step()  # counts the pass

    def _optimizer_step(self) -> None:
        self._norm = self._clip_without_zero()
        if self._watch is not None:
            self._watch, watch = None, self._watch
            watch.end()
        self._step_deepspeed()
        applied = self._engine.was_step_applied() if self._norm is None else bool(self._norm.isfinite())
        self._skipped = not applied and not self._gate.held_back

    def _step_deepspeed(self) -> None:
        self._engine.step()

    def _own_layers(self) -> range | None:
        """The layers whose states this rank's rows carry; None for all."""
        return None

    def _fragments(self) -> list[Fragment]:
        return list(fragments(self.module, self._engine.optimizer, self.config.zero_stage, self.mesh.replicas.index))

    def _to_device(self, batch: Batch) -> Moved:
        return (
            batch.tokens.to(self.world.device, non_blocking=True),
            batch.targets.to(self.world.device, non_blocking=True),
            batch.resets,
        )

    def _clip_without_zero(self) -> Tensor | None:
        if self.config.zero_stage > 0:
            return None
        norm = clip_gradients(self.module.parameters(), self._clip, self.mesh)
        if self._gate.holds_back(norm) or not norm.isfinite():
            self.module.zero_grad(set_to_none=True)  # the optimizer passes by a parameter without a gradient
        return norm

    def _rows_of_bad(self, losses: list[Tensor]) -> list[int]:
        finite = torch.isfinite(torch.stack(losses)).tolist()
        ranks, rank = self.mesh.data.size, self.mesh.data.index
        groups = [index * ranks + rank for index, well in enumerate(finite) if not well]
        size = self._micro_batch_size
        return [row for group in groups for row in range(group * size, (group + 1) * size)]

    def _of_all_ranks(self, *lists: list[int]) -> list[tuple[int, ...]]:
        """Each of the lists, joined over the ranks."""
        count = torch.tensor(sum(map(len, lists)), device=self.world.device)
        dist.all_reduce(count)
        if not count:
            return [() for _ in lists]
        return [tuple(sorted(set().union(*parts))) for parts in zip(*gather_objects(lists), strict=True)]


def mean_over_segments(stats: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """The layers' statistics of segments of one length."""
    return [mean_statistics([(1, segment) for segment in layer]) for layer in zip(*stats, strict=True)]


def _require_no_buffers(model: nn.Module) -> None:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    lost: Mapping[str, Tensor] = {name: value for name, value in model.state_dict().items() if name not in parameters}
    if lost:
        raise ValueError(
            f"persistent buffers are not part of checkpoints: {', '.join(lost)}; register them with persistent=False"
        )
