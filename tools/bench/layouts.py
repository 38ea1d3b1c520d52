"""`tools.bench layouts`: where a step's time goes in layouts of two ranks, beside what `tools.plan` predicts."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from launch.local import free_port
from launch.processes import ProcessGroup, RankCommand, describe_exit
from model.flops import flops_per_token
from tools.bench.benchmark import Benchmark
from tools.bench.cases import LAST_LINES, REPOSITORY, Row, run_cases
from tools.bench.layout_rank import AXES, RANKS, recipe_of
from tools.bench.tables import Column, Presentation, milliseconds, percent
from tools.command import positive_int
from tools.plan.cluster import Cluster, Device
from tools.plan.rates import Measured, fitted
from tools.plan.timing import step_time

ALONE = "alone"
SIZES = ("length", "rows", "dim", "heads", "layers", "chunk_size", "window")


def beside_the_plan(rows: Sequence[Row]) -> list[Row]:
    """The rows with what `tools.plan` predicts of them: rates from the rows of one process, and the link's speed as it
    was measured in each layout.
    """
    alone = [row for row in rows if row["layout"] == ALONE and "outcome" not in row]
    rates = fitted([_measured(row) for row in alone], "one process") if alone else None
    result = []
    for row in rows:
        if "outcome" not in row:
            unwaited = row["seconds"] - row["collectives_s"] - row["bubble_s"]
            row = {**row, "core_share": row["compute_s"] / unwaited}
            if row["layout"] != ALONE and rates is not None and any(a["variant"] == row["variant"] for a in alone):
                recipe = recipe_of(row["variant"], axis=row["layout"], **_sizes(row))
                cpu = Device("CPU", 1.0, row["link_bytes_per_second"])
                planned = step_time(recipe, recipe.parallel.layout(RANKS), Cluster(cpu, 1, RANKS), rates)
                row |= {"planned_compute_s": planned.compute + planned.memory_updates, "planned_s": planned.total}
                row |= {"planned_collectives_s": planned.collectives, "planned_bubble_s": planned.bubble}
                row["planned_over"] = row["planned_compute_s"] / row["compute_s"] - 1
        result.append(row)
    return result


def _sizes(row: Mapping[str, Any]) -> dict[str, int]:
    return {name: row[name] for name in SIZES}


def _measured(row: Mapping[str, Any]) -> Measured:
    recipe = recipe_of(row["variant"], axis=None, **_sizes(row))
    flops, tokens = flops_per_token(recipe.model, row["length"]), recipe.training.batch_tokens
    return Measured(row["variant"], row["length"], tokens * flops.model, tokens * flops.memory, row["compute_s"])


PRESENTATION = Presentation(
    title="Layouts of two ranks, and what the plan says of them",
    case=(
        Column("model", "variant"),
        Column("two ranks along", "layout"),
        *(Column(name.replace("_", " "), name) for name in SIZES),
    ),
    found=(
        Column("ms a step", "seconds", milliseconds),
        Column("planned", "planned_s", milliseconds),
        Column("ms of compute", "compute_s", milliseconds),
        Column("planned", "planned_compute_s", milliseconds),
        Column("planned over measured", "planned_over", percent),
        Column("ms of collectives", "collectives_s", milliseconds),
        Column("planned", "planned_collectives_s", milliseconds),
        Column("ms of bubble", "bubble_s", milliseconds),
        Column("planned", "planned_bubble_s", milliseconds),
        Column("had of its core", "core_share", percent),
        Column("last loss", "loss", lambda value: f"{value:.5f}"),
        Column("link MB/s", "link_bytes_per_second", lambda value: f"{value / 1e6:,.0f}"),
    ),
    note="A process has one thread. Alone: two processes that train by themselves at the same time, as two ranks share "
    "this machine; the plan's speed of computing is from these rows. Compute: the processor's time; collectives: the "
    "clock's inside of them, so waiting for a rank that is behind counts; bubble: the clock's in which a stage waits "
    "for what the other one hands on. Had of its core: compute over the time that is neither of these two; what else "
    "ran on the machine had the rest, and makes the clock's numbers larger. Link: an all-reduce of the gradient (data) "
    "or of a micro-batch's activations, timed beside the steps; the plan is given it. Means over ranks, of the fastest "
    "step. Micro-batches of one row, ZeRO 1, fp32. All train on the same rows from the same weights.",
    prepare=beside_the_plan,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench layouts`."""
    parser.add_argument(
        "--variants", nargs="+", default=["mag", "transformer"], metavar="NAME",
        choices=("mag", "mal", "lmm", "transformer"), help="models (default: mag transformer)",
    )  # fmt: skip
    parser.add_argument(
        "--axes", nargs="+", choices=list(AXES), default=list(AXES), help="of two ranks each (default: all)"
    )
    parser.add_argument("--length", type=positive_int, default=512, metavar="N", help="tokens in a row")
    parser.add_argument("--rows", type=positive_int, default=4, metavar="N", help="of a step")
    parser.add_argument("--dim", type=positive_int, default=256, help="width of the model")
    parser.add_argument("--heads", type=positive_int, default=4, help="number of heads")
    parser.add_argument("--layers", type=positive_int, default=4, help="number of layers")
    parser.add_argument("--chunk-size", type=positive_int, default=64, help="tokens in a chunk of the memory")
    parser.add_argument("--window", type=positive_int, default=256, help="attention window")
    parser.add_argument("--steps", type=positive_int, default=3, help="that are timed, the fastest counts")


def prepare(arguments: argparse.Namespace) -> Benchmark:
    """The benchmark that the options describe."""
    sizes = {name: getattr(arguments, name) for name in SIZES}
    settings = {"device": "cpu", "threads": 1, "steps": arguments.steps}
    launches = [
        {"variant": variant, "axes": axes, "sizes": sizes}
        for variant in arguments.variants
        for axes in ([None], arguments.axes)
    ]

    def rows(deadline: float | None) -> Iterator[Row]:
        for row in run_cases("tools.bench.layouts:measure", launches, settings, deadline=deadline):
            named = [{"variant": row["variant"], "layout": axis or ALONE, **sizes} for axis in row["axes"]]
            told = {name: row[name] for name in ("outcome", "why") if name in row}
            found = [told] * len(named) if told else row["found"]
            yield from ({**case, **of_case} for case, of_case in zip(named, found, strict=True))

    return Benchmark("layouts", settings, rows)


def measure(
    *, variant: str, axes: list[str | None], sizes: dict[str, int], device: str, threads: int, steps: int
) -> dict[str, Any]:
    """Two processes that are the ranks of the axes' layouts, one after another, or, for the axis None, two that train
    by themselves. Raises RuntimeError with what a process that failed said last.
    """
    work = json.dumps({"variant": variant, "axes": axes, "sizes": sizes, "steps": steps, "threads": threads})
    launched = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])}
    # The group's guard ends the ranks where this process is cut off, too.
    with tempfile.TemporaryDirectory() as folder, ProcessGroup() as group:
        outputs = [Path(folder) / f"{rank}.json" for rank in range(RANKS)]
        for rank, output in enumerate(outputs):
            variables = {} if axes == [None] else {**launched, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            argv = [sys.executable, "-m", "tools.bench.layout_rank", work, str(output)]
            group.start(RankCommand(rank, argv, {**os.environ, **path, **variables}, output.with_suffix(".log")))
        _wait_for_all(group)
        written = outputs if axes == [None] else outputs[:1]  # of ranks that train together by the first, for all
        by_process = [json.loads(output.read_text()) for output in written]
    return {"found": [_mean(each) for each in zip(*by_process, strict=True)]}


def _wait_for_all(group: ProcessGroup) -> None:
    """Until all have ended, or one has failed: the others would wait for it. Raises RuntimeError with what it said
    last, and how it ended.
    """
    while group.running() and not group.failed():
        time.sleep(0.05)
    if failed := group.failed():
        said = [line for line in failed[0].last_lines() if line.strip()][-LAST_LINES:]
        raise RuntimeError("\n".join([*said, f"rank {failed[0].rank}: {describe_exit(failed[0].popen.returncode)}"]))


def _mean(rows: Sequence[Row]) -> Row:
    """Of what processes found of the same case."""
    return {name: None if None in (found := [row[name] for row in rows]) else fmean(found) for name in rows[0]}
