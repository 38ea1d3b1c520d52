"""Runs on every rank of test_pipeline.py: the passes of a step on the stages of a pipeline, in float64 and without
DeepSpeed, against one process that runs the whole model; and stages that sleep, to see the schedule alone.

Arguments: OUTPUT.pt, and "every" for all variants. Four ranks: the stages of one pipeline, or of two that read other
rows.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ModelState, TitansLM
from parallel.boundary_states import BoundaryStates, DeviceStates, Place, State, open_boundary_states
from parallel.loss_module import LossModule, flattened, unflattened
from parallel.mesh import Layout, Mesh
from parallel.pipeline_links import Links
from parallel.pipeline_run import StageResult, StageRun
from parallel.pipeline_schedule import expected_bubble
from parallel.pipeline_stages import cut_to_stage, receive, stage_layers
from parallel.process import barrier, exit_now, gather_objects, initialize, shutdown
from parallel.segments import Piece, Segments
from parallel.stage_clock import StageClock, bubble
from tests.model_cases import build_model, random_tokens
from tests.parallel.worker_groups import leave_groups
from tools.bench.live_tensors import LiveTensors

ROWS, LENGTH, LAYERS = 2, 16, 4
SCALE = 0.1
NUMBERS_OF_SEGMENTS = (8, 16)
FORWARD_SECONDS, BACKWARD_SECONDS = 0.02, 0.04
PACES = (1, 1, 2, 2, 4, 4, 8, 8)
"""How many times as long stages sleep: beside longer sleeps it matters less that others hold the processor."""
SLEEPING = ((8, 1), (1, 8), (2, 8))
"""Sequences and segments of steps in which stages sleep."""


@dataclass(frozen=True)
class Trial:
    case: str
    stages: int
    sequences: int = 3
    segments: int = 1
    truncate_every: int | None = None
    recompute: bool = False
    carried: bool = False
    """Rows go on from an earlier state, and documents begin inside."""

    def __str__(self) -> str:
        return "-".join(str(value) for value in vars(self).values())


VARIANTS = ("mac", "mag", "mal", "lmm", "lmm-softmax", "transformer")
TRIALS = [
    Trial("mac", 4),
    Trial("lmm", 4, sequences=2, segments=8),
    Trial("mac", 2, sequences=1, segments=8, recompute=True),
    Trial("mag", 4, 1, 8, 3),
    Trial("mal", 2, 2, 4, 2, carried=True),
    Trial("lmm-softmax", 4, 1, 4, carried=True),
]
EVERY = [
    Trial(case, stages, 2, segments, every)
    for case in VARIANTS
    for stages in (2, 4)
    for segments, every in ((1, None), (8, None), (8, 3))
]


def sequences_of(trial: Trial, pipeline: int) -> list[list[Piece]]:
    """The rows of one pipeline: micro-batches of pieces."""
    cut = Segments(LENGTH // trial.segments, trial.segments)
    made = []
    for number in range(trial.sequences):
        tokens = random_tokens(ROWS, LENGTH + 1, seed=10 * pipeline + number)
        targets = tokens[:, 1:].clone()
        targets[0, : 5 + number] = -100
        resets = None
        if trial.carried:
            resets = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
            resets[0, 8] = resets[1, 0] = resets[1, 8] = True
        made.append(cut.cut(tokens[:, :-1], targets, resets))
    return made


def beginning(trial: Trial, model: TitansLM) -> State:
    """What rows go on from: all layers' state."""
    if not trial.carried:
        return {}
    with torch.no_grad():
        return model(random_tokens(ROWS, 8, seed=77)).state.flat()


def whole(trial: Trial, pipeline: int) -> tuple[dict[str, Tensor], list[Tensor], State]:
    """On one process, with the graph of whole sequences: gradients, losses, the state behind the last sequence."""
    model = build_model(trial.case, torch.float64, num_layers=LAYERS)
    begins, losses = beginning(trial, model), []
    for pieces in sequences_of(trial, pipeline):
        state = ModelState.from_tensors(begins) if begins else None
        loss = torch.zeros((), dtype=torch.float64)
        for index, (tokens, targets, resets) in enumerate(pieces):
            if trial.truncate_every and index % trial.truncate_every == 0 and state is not None:
                state = state.detach()
            output = model(tokens, state, targets=targets, resets=resets)
            loss, state = loss + output.loss_sum, output.state
        (loss * SCALE).backward()
        losses.append(loss.detach())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients, losses, state.detach().flat()


class Stage:
    """A stage without an engine."""

    def __init__(self, trial: Trial, mesh: Mesh) -> None:
        self.model = build_model(trial.case, torch.float64, num_layers=LAYERS)
        self.begins = beginning(trial, self.model)
        self.model.set_activation_checkpointing(trial.recompute)
        place = mesh.place.pipeline
        layers = stage_layers(self.model, trial.stages, "parameters", LENGTH)
        cut_to_stage(self.model, layers, place)
        elsewhere = [f"layers.{n}." for n in range(LAYERS) if n not in layers[place]]
        self.begins = {name: t for name, t in self.begins.items() if not name.startswith(tuple(elsewhere))}
        self.module = LossModule(self.model)

    def forward(self, arrived: Tensor | None, piece: Piece, state: State, with_stats: bool) -> tuple[Any, State, Any]:
        if arrived is not None:
            receive(self.model, arrived)
        tokens, targets, resets = piece
        output, stats, _, after = self.module(tokens, targets, with_stats, False, flattened(state), resets)
        return output, unflattened(after), stats

    def run(
        self, links: Links, sequences: list[list[Piece]], boundaries: BoundaryStates, truncate_every: int | None = None
    ) -> StageResult:
        return StageRun(
            links,
            self.forward,
            lambda piece: torch.empty(*piece[0].shape, self.model.config.dim, dtype=torch.float64),
            sequences,
            [self.begins] * len(sequences),
            boundaries,
            StageClock(torch.device("cpu")),
            scale=SCALE,
            truncate_every=truncate_every,
            keeps_states=True,
        ).run()


def run(trial: Trial, mesh: Mesh) -> dict[str, float]:
    stage, links = Stage(trial, mesh), Links(mesh)
    boundaries = Counted(DeviceStates())
    result = stage.run(links, sequences_of(trial, mesh.place.data), boundaries, trial.truncate_every)
    links.close()
    return compare(trial, mesh, stage.model, result) | {"left": float(len(boundaries.held))}


def compare(trial: Trial, mesh: Mesh, model: TitansLM, result: StageResult) -> dict[str, float]:
    """On each pipeline's first stage, the largest difference of each kind over all its stages, relative to the norm.
    The gradient of a tied embedding is the sum of its two copies'.
    """
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    stages = [found for place, found in gather_objects((mesh.place.data, (own, result))) if place == mesh.place.data]
    if mesh.place.pipeline > 0:
        return {}
    gradients, losses, state = whole(trial, mesh.place.data)
    summed: dict[str, Tensor] = {}
    for held, _ in stages:
        for name, gradient in held.items():
            summed[name] = summed[name] + gradient if name in summed else gradient
    assert summed.keys() == gradients.keys(), summed.keys() ^ gradients.keys()
    assert [len(found.losses) for _, found in stages] == [0] * (trial.stages - 1) + [trial.sequences]
    behind = {name: tensor for _, found in stages for name, tensor in found.states[-1].items()}
    assert behind.keys() == state.keys(), behind.keys() ^ state.keys()
    return {
        "gradients": max(relative(summed[name], gradient) for name, gradient in gradients.items()),
        "losses": max(map(relative, stages[-1][1].losses, losses)),
        "states": max(relative(behind[name], tensor) for name, tensor in state.items()),
    }


def relative(value: Tensor, expected: Tensor) -> float:
    if value.shape != expected.shape:
        return float("inf")
    value, expected = value.double(), expected.double()
    assert value.isfinite().all()  # max() passes over NaN
    return float((value - expected).norm() / expected.norm().clamp(min=1e-30))


def peak_bytes(mesh: Mesh, segments: int, place: Place, folder: Path) -> tuple[int, int]:
    """The most that tensors of a stage held at once in a step over so many segments of four tokens, beside parameters
    and tokens; and the most that boundaries held, of it or of the disk.
    """
    trial = Trial("lmm", mesh.layout.pipeline, sequences=2, segments=segments)
    stage, links = Stage(trial, mesh), Links(mesh)
    tokens = random_tokens(ROWS, 4 * segments + 1)
    sequences = [Segments(4, segments).cut(tokens[:, :-1], tokens[:, 1:])] * trial.sequences
    for parameter in stage.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with open_boundary_states(place, folder) as boundaries:
        counted = Counted(boundaries)
        with LiveTensors() as live:
            stage.run(links, sequences, counted)
    links.close()
    return live.peak_bytes, counted.peak_bytes


class Counted(BoundaryStates):
    """Counts what a store holds."""

    def __init__(self, store: BoundaryStates) -> None:
        self.store = store
        self.held: dict[int, int] = {}
        self.peak_bytes = 0

    def put(self, segment: int, state: State) -> None:
        self.held[segment] = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        self.peak_bytes = max(self.peak_bytes, sum(self.held.values()))
        self.store.put(segment, state)

    def take(self, segment: int) -> State:
        self.held.pop(segment)
        return self.store.take(segment)


class Sleep(torch.autograd.Function):
    """Takes its time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pace: int) -> Tensor:
        ctx.pace = pace
        time.sleep(FORWARD_SECONDS * pace)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(BACKWARD_SECONDS * ctx.pace)
        return gradient, None


def sleeping_bubble(mesh: Mesh, sequences: int, segments: int) -> float:
    """The bubble of stages that sleep instead of compute, as it is measured: the schedule's and the links'."""

    def forward(
        pace: int, arrived: Tensor | None, piece: Piece, state: State, with_stats: bool
    ) -> tuple[Tensor, State, None]:
        x = Sleep.apply(torch.zeros(4, requires_grad=True) if arrived is None else arrived, pace)
        return x.sum() if links.is_last else x, {"state": x}, None

    links = Links(mesh)
    enough = 1.1 * expected_bubble(mesh.layout.pipeline, sequences * segments)
    for pace in PACES:
        barrier()
        clock = StageClock(torch.device("cpu"))
        pieces = [[(torch.zeros(1),)] * segments] * sequences
        sleeping = partial(forward, pace)
        StageRun(links, sleeping, lambda _: torch.empty(4), pieces, [{}] * sequences, DeviceStates(), clock).run()
        found = bubble(gather_objects(clock.seconds()))
        if found < enough:
            break
    links.close()
    return found


def main(output: Path, *which: str) -> None:
    world = initialize("cpu")
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    for trial in EVERY if which else TRIALS:
        mesh = Mesh.build(world, Layout(pipeline=trial.stages, data=world.size // trial.stages))
        seen[str(trial)] = gather_objects(run(trial, mesh))
        leave_groups()
    mesh = Mesh.build(world, Layout(pipeline=world.size))
    for place, segments in product(() if which else ("device", "disk"), NUMBERS_OF_SEGMENTS):
        seen[f"bytes-{place}-{segments}"] = gather_objects(peak_bytes(mesh, segments, place, output.parent))
    for shape in () if which else SLEEPING:
        seen[f"bubble-{shape}"] = sleeping_bubble(mesh, *shape)
    if world.is_main:
        torch.save(seen, output)
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
