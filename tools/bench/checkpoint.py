"""`tools.bench checkpoint`: what a save costs the steps of training, beside them and between them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from parallel.mesh import Mesh
from parallel.process import World, initialize
from parallel.watchdog import Watchdog
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoints import Checkpoints
from pretrain.config import Recipe, load_recipe
from pretrain.loop import build_engine
from pretrain.metrics import RunLog
from pretrain.phases import Phases
from pretrain.resume import TrainerState, checkpoint_files
from pretrain.saver import Saver
from tools.bench.benchmark import Benchmark
from tools.bench.cases import Row, run_cases
from tools.bench.clock import chosen_device, wait_for
from tools.bench.tables import Column, Presentation, megabytes, milliseconds, percent, whole
from tools.bench.train import RandomBatch
from tools.command import positive_int

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml"
_FOREVER = 3600.0

PRESENTATION = Presentation(
    title="Saving checkpoints",
    case=(Column("recipe", "recipe"),),
    found=(
        Column("MB", "bytes", megabytes),
        Column("ms a step", "step_s", milliseconds),
        Column("ms a step beside a save", "beside_s", milliseconds),
        Column("added", "beside_added", percent),
        Column("of these steps", "beside_steps", whole),
        Column("ms waited, beside", "stall_s", milliseconds),
        Column("of a step", "stall_share", percent),
        Column("ms waited, between", "sync_s", milliseconds),
        Column("of a step, between", "sync_share", percent),
        Column("ms to write beside", "write_s", milliseconds),
    ),
    note="One process. In every round some steps are taken with no save, then a save begins and steps are taken until "
    "it is on the disk, then one is written while steps wait. Means over all rounds; added: of the mean step beside a "
    "save over one without. Waited: for how long a save keeps the next step from beginning, copying to the host's "
    "memory and, between steps, writing, syncing and hashing included.",
)


class _Saves(RunLog):
    """Keeps what is told of saves, and writes nothing."""

    def __init__(self) -> None:
        super().__init__(Path(), name="bench", is_main=False, start_step=0, total_steps=1)
        self.saves: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> None:
        if kind != "save":
            raise RuntimeError(f"{kind}: {fields}")
        self.saves.append(fields)


class _Training:
    """The recipe's engine on random tokens, and its saves into a folder."""

    def __init__(self, recipe: Recipe, world: World, folder: Path) -> None:
        phases = Phases.alone(recipe)
        batches = phases[0].batches(world.size)
        self._engine = build_engine(recipe, batches, Mesh.data_parallel(world))
        self._device, self._number, self._lr = world.device, 0, recipe.optimizer.lr
        training, vocabulary = recipe.training, recipe.model.vocab_size
        shape = (batches.accumulation, training.micro_batch_size, training.sequence_length + 1)
        tokens = torch.randint(vocabulary, shape, device=world.device)
        self._batches = [RandomBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens]
        self._files = lambda state: partial(checkpoint_files, self._engine, state, phases, phases[0], None, world)
        self.log = _Saves()
        checkpoints, self._watchdog = Checkpoints(folder, 2, world), Watchdog(_FOREVER, rank=0, ranks=1)
        self.beside, self.between = (
            Saver(checkpoints, CheckpointConfig(asynchronous=way), self.log, self._watchdog, last_tokens=0)
            for way in (True, False)
        )

    def step(self) -> float:
        """Seconds of a step, the look at the save under way included."""
        start = time.perf_counter()
        self._engine.train_step(self._batches, self._lr)
        wait_for(self._device)
        self._number += 1
        self.beside.look()
        return time.perf_counter() - start

    def save(self, saver: Saver) -> float:
        """Seconds for which a save keeps the next step from beginning."""
        state = TrainerState(step=self._number, tokens=self._number, tokenizer_sha256=None, ranks=1)
        start = time.perf_counter()
        saver.save(state, self._files(state), stays=False, wait=False)
        return time.perf_counter() - start

    def steps_beside(self) -> list[float]:
        """Seconds of each step from a save's beginning to its end."""
        told, seconds = len(self.log.saves), []
        while len(self.log.saves) == told:
            seconds.append(self.step())
        return seconds

    def end(self) -> None:
        """Let go of all."""
        for saver in (self.beside, self.between):
            with saver:
                saver.finish()
        self._watchdog.rest()
        self._engine.destroy()


def measure(*, recipe: str, device: str, threads: int, rounds: int, steps: int, folder: str | None) -> dict[str, Any]:
    """The mean seconds of steps without a save and beside one, and for how long saves keep them waiting."""
    torch.set_num_threads(threads)
    world = initialize(device)
    torch.manual_seed(0)
    plain, beside, stalls, waits = [], [], [], []
    with TemporaryDirectory(prefix="mnemosyne-bench-checkpoint-", dir=folder) as place:
        training = _Training(load_recipe(RECIPE.with_name(f"{recipe}.yaml")), world, Path(place))
        for _ in range(3):  # the first allocates, and so does the first save
            training.step()
        training.save(training.beside)
        training.steps_beside()
        training.log.saves.clear()
        for _ in range(rounds):
            plain += [training.step() for _ in range(steps)]
            stalls.append(training.save(training.beside))
            beside += training.steps_beside()
            waits.append(training.save(training.between))
        size = sum(path.stat().st_size for path in Path(training.log.saves[-1]["checkpoint"]).iterdir())
        training.end()
    step_s, beside_s, stall_s, sync_s = (sum(each) / len(each) for each in (plain, beside, stalls, waits))
    return {
        "bytes": size,
        "step_s": step_s,
        "beside_s": beside_s,
        "beside_added": beside_s / step_s - 1,
        "beside_steps": len(beside),
        "stall_s": stall_s,
        "stall_share": stall_s / step_s,
        "sync_s": sync_s,
        "sync_share": sync_s / step_s,
        "write_s": sum(save["write_seconds"] for save in training.log.saves[::2]) / rounds,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench checkpoint`."""
    parser.add_argument("--rounds", type=positive_int, default=20, help="saves of each kind")
    parser.add_argument("--steps", type=positive_int, default=5, help="steps without a save in each round")
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads of the steps")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is")
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: where temporary files are)")


def prepare(arguments: argparse.Namespace) -> Benchmark:
    """The benchmark that the options describe."""
    settings = {
        "device": chosen_device(arguments.device).type,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "folder": None if arguments.folder is None else str(arguments.folder),
    }
    cases = [{"recipe": RECIPE.stem}]

    def rows(deadline: float | None) -> Iterator[Row]:
        return run_cases("tools.bench.checkpoint:measure", cases, settings, deadline=deadline)

    return Benchmark("checkpoint", settings, rows)
