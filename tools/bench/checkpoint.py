"""`tools.bench checkpoint`: what a save costs the steps of training, beside them and between them."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import torch

from parallel.mesh import Mesh
from parallel.process import World, initialize
from parallel.watchdog import Watchdog
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoints import MANIFEST, Checkpoints
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
from tools.command import positive_int, positive_number

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml"
_FOREVER = 3600.0

PRESENTATION = Presentation(
    title="Saving checkpoints",
    case=(Column("recipe", "recipe"),),
    found=(
        Column("rounds", "rounds"),
        Column("MB", "bytes", megabytes),
        Column("ms a step", "step_s", milliseconds),
        Column("added beside a save", "beside_added", percent),
        Column("half of the saves from", "beside_added_low", percent),
        Column("to", "beside_added_high", percent),
        Column("added CPU time", "cpu_added", percent),
        Column("steps beside a save", "beside_steps"),
        Column("ms waited, beside", "stall_s", milliseconds),
        Column("of a step", "stall_share", percent),
        Column("ms waited, between", "sync_s", milliseconds),
        Column("of a step, between", "sync_share", percent),
        Column("ms to write beside", "write_s", milliseconds),
        Column("saves with the same bytes", "same_bytes", whole),
    ),
    note="One process. In every round some steps are taken with no save, then one is written while steps wait, then "
    "one of the same state begins and steps are taken until it is on the disk: what they take, and what they waited "
    "for it, over the steps of the rounds on both sides. Medians over the rounds. Waited: for how long a save keeps "
    "the next step from beginning, copying to the host's memory and, between steps, writing, syncing and hashing "
    "included. CPU time: of all threads of the process, so that nothing else on the machine is in it. The same bytes: "
    "of all files, written beside the steps and between them, in as many rounds.",
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
        self.log, self._watchdog = _Saves(), Watchdog(_FOREVER, rank=0, ranks=1)
        self.beside, self.between = (
            Saver(
                Checkpoints(folder / way, 2, world),
                CheckpointConfig(asynchronous=way == "beside"),
                self.log,
                self._watchdog,
                last_tokens=0,
            )
            for way in ("beside", "between")
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


@dataclass
class _Round:
    """Seconds of a round's parts."""

    plain: list[float]
    plain_cpu: float
    """Of a step."""
    sync: float
    stall: float
    beside: list[float]
    beside_cpu: float
    """Of a step, with its share of the save."""
    write: float
    is_same: bool
    """Whether both saves have the same bytes."""

    def added(self, neighbours: Sequence[_Round]) -> float:
        """What a step beside the save takes more, its share of what was waited for included, than those without one."""
        without = median([seconds for each in neighbours for seconds in each.plain])
        return (self.stall + sum(self.beside)) / len(self.beside) / without - 1

    def added_cpu(self, neighbours: Sequence[_Round]) -> float:
        """The same of CPU time."""
        return self.beside_cpu / median([each.plain_cpu for each in neighbours]) - 1


def _round(training: _Training, steps: int) -> _Round:
    start = time.process_time()
    plain = [training.step() for _ in range(steps)]
    plain_cpu = (time.process_time() - start) / steps
    sync = training.save(training.between)
    start = time.process_time()
    waited = training.save(training.beside)
    beside = training.steps_beside()
    beside_cpu = (time.process_time() - start) / len(beside)
    between, written = training.log.saves[-2:]
    manifests = [(Path(save["checkpoint"]) / MANIFEST).read_text() for save in (between, written)]
    is_same = manifests[0] == manifests[1]
    return _Round(plain, plain_cpu, sync, waited, beside, beside_cpu, written["write_seconds"], is_same)


def measure(
    *,
    recipe: str,
    device: str,
    threads: int,
    cores: int | None,
    rounds: int,
    steps: int,
    seconds: float,
    folder: str | None,
) -> dict[str, Any]:
    """What saves add to the steps beside them, and for how long they keep steps waiting: medians over the rounds, at
    least one, none of which begins after `seconds`.
    """
    begun = time.monotonic()
    if cores is not None:  # before there are threads, which take it over
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(threads)
    world = initialize(device)
    torch.manual_seed(0)
    with TemporaryDirectory(prefix="mnemosyne-bench-checkpoint-", dir=folder) as place:
        training = _Training(load_recipe(RECIPE.with_name(f"{recipe}.yaml")), world, Path(place))
        _round(training, 3)  # the first step allocates, and so does the first save
        done: list[_Round] = []
        while not done or (len(done) < rounds and time.monotonic() < begun + seconds):
            done.append(_round(training, steps))
        size = sum(path.stat().st_size for path in Path(training.log.saves[-1]["checkpoint"]).iterdir())
        training.end()
    added = [each.added(done[i : i + 2]) for i, each in enumerate(done)]
    low, _, high = quantiles(added, n=4, method="inclusive") if len(added) > 1 else added * 3
    step_s = median([seconds for each in done for seconds in each.plain])
    stall_s, sync_s = median([each.stall for each in done]), median([each.sync for each in done])
    return {
        "rounds": len(done),
        "bytes": size,
        "step_s": step_s,
        "beside_added": median(added),
        "beside_added_low": low,
        "beside_added_high": high,
        "cpu_added": median([each.added_cpu(done[i : i + 2]) for i, each in enumerate(done)]),
        "beside_steps": median([len(each.beside) for each in done]),
        "stall_s": stall_s,
        "stall_share": stall_s / step_s,
        "sync_s": sync_s,
        "sync_share": sync_s / step_s,
        "write_s": median([each.write for each in done]),
        "same_bytes": sum(each.is_same for each in done),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench checkpoint`."""
    parser.add_argument("--rounds", type=positive_int, default=40, help="saves of each kind")
    parser.add_argument("--steps", type=positive_int, default=3, help="steps without a save in each round")
    parser.add_argument("--seconds", type=positive_number, default=240, help="no round begins after so many")
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads of the steps")
    parser.add_argument(
        "--cores", type=positive_int, help="CPU cores that the steps and what writes share, on Linux (default: all)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is")
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: where temporary files are)")


def prepare(arguments: argparse.Namespace) -> Benchmark:
    """The benchmark that the options describe."""
    settings = {
        "device": chosen_device(arguments.device).type,
        "threads": arguments.threads,
        "cores": arguments.cores,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "seconds": arguments.seconds,
        "folder": None if arguments.folder is None else str(arguments.folder),
    }
    cases = [{"recipe": RECIPE.stem}]

    def rows(deadline: float | None) -> Iterator[Row]:
        return run_cases("tools.bench.checkpoint:measure", cases, settings, deadline=deadline)

    return Benchmark("checkpoint", settings, rows)
