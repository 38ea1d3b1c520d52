"""`tools.bench memory`: time, TFLOP/s and peak memory of the neural memory, forward and backward."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kernels.memory import neural_memory
from kernels.memory.interface import BACKENDS
from model.memory import activation_scale
from pretrain.errors import UserError
from tools.bench import rival
from tools.bench.benchmark import Benchmark
from tools.bench.cases import Row, grid, run_cases
from tools.bench.clock import DTYPES, add_device_arguments, device_settings, forward_and_backward
from tools.bench.memory_inputs import inputs_of
from tools.bench.record import RIVAL
from tools.bench.roofline import memory_bytes, memory_config, memory_flops, rates
from tools.bench.tables import HEADS, MEMORIES, PEAK, RATES, TIMES, Column, Presentation, digits, times, whole
from tools.command import positive_int

LENGTHS = [1024, 4096, 16384, 65536]
WARM_UP_TOKENS = 64

PRESENTATION = Presentation(
    title="The neural memory: forward and backward",
    case=(
        Column("tokens", "length", whole),
        Column("backend", "backend"),
        *HEADS,
        *MEMORIES,
    ),
    found=(
        *TIMES,
        *RATES,
        PEAK,
        Column("KB a token", "kb_per_token", digits),
        Column("speed over dual", "speed_over_dual", times),
        Column("memory over dual", "memory_over_dual", times),
    ),
    note="TFLOP/s counts what training counts: backward twice the forward, nothing that is computed again. Roofline: "
    "the least time that the device's peaks allow for these operations, and for reading and writing the inputs, the "
    "output and their gradients once. n/a: no peak is known for the device, or the dual form was not measured.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench memory`."""
    parser.add_argument(
        "--lengths",
        type=positive_int,
        nargs="+",
        metavar="TOKENS",
        help="tokens in a row (default: 1024 4096 16384 65536; with --against 4096)",
    )
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1], metavar="ROWS", help="rows")
    parser.add_argument("--heads", type=positive_int, default=4, help="number of heads")
    parser.add_argument("--head-dim", type=positive_int, default=64, help="width of a head")
    parser.add_argument("--depth", type=int, choices=range(1, 5), default=2, help="layers of the memory, 1 to 4")
    parser.add_argument(
        "--expansion", type=positive_int, nargs="+", default=[4], help="hidden width of the memory over the head's"
    )
    parser.add_argument("--chunk-size", type=positive_int, nargs="+", default=[64], help="tokens in a chunk")
    parser.add_argument(
        "--backends",
        choices=BACKENDS,
        nargs="+",
        help="of kernels.memory (default: all that suit the device, without the per-token reference)",
    )
    rival.add_arguments(parser)
    add_device_arguments(parser)


def default_backends(device: str) -> list[str]:
    """All backends but the choice itself and the per-token oracle; on a CPU those of Triton need its interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return [
        backend
        for backend in BACKENDS
        if backend not in ("auto", "reference") and (device == "cuda" or interpreted or "triton" not in backend)
    ]


def prepare(arguments: argparse.Namespace) -> Benchmark:
    """The benchmark that the options describe. Raises UserError for options that don't fit together."""
    settings = device_settings(arguments)
    if arguments.against is not None:
        if arguments.backends is not None:
            raise UserError("--backends: not with --against, which compares what 'auto' computes; leave it out")
        return rival.prepare(arguments, settings)
    for option in ("exact_lengths", "rounds"):
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option.replace('_', '-')}: belongs to --against {RIVAL}; give that, or leave it out")
    shape = {"heads": arguments.heads, "head_dim": arguments.head_dim, "depth": arguments.depth}
    cases = grid({
        "length": arguments.lengths or LENGTHS,
        "batch": arguments.batch,
        "expansion": arguments.expansion,
        "chunk_size": arguments.chunk_size,
    })  # fmt: skip
    backends = arguments.backends or default_backends(settings["device"])
    cases = [{"backend": backend, **case, **shape} for case in cases for backend in backends]

    def rows(deadline: float | None) -> Iterator[Row]:
        return run_cases("tools.bench.memory:measure", cases, settings, deadline=deadline)

    return Benchmark("memory", {**settings, **shape, "backends": backends}, rows, beside_dual)


def measure(
    *,
    backend: str,
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    depth: int,
    expansion: int,
    chunk_size: int,
    device: str,
    dtype: str,
    threads: int,
    repeats: int,
) -> dict[str, Any]:
    """Fastest forward and backward in seconds, growth of memory in bytes over the inputs' own, and rates from them."""
    torch.set_num_threads(threads)
    config, where = memory_config(depth, expansion, chunk_size), torch.device(device)
    options = {"chunk_size": chunk_size, "step_bound": config.bound, "backend": backend}
    options["activation_scale"] = activation_scale(config, expansion * head_dim) if depth > 1 else 1.0

    def measured(length: int, repeats: int) -> dict[str, Any]:
        inputs, weights = inputs_of(batch, length, heads, head_dim, depth, expansion, DTYPES[dtype], device)
        call = lambda: neural_memory(*inputs, weights, **options)[0]  # noqa: E731
        return forward_and_backward(call, [*inputs, *weights], where, repeats)

    # The first call loads libraries and, on a GPU, compiles for the very shapes.
    measured(length if device == "cuda" else min(length, WARM_UP_TOKENS), 1)
    found = measured(length, repeats)
    flops = memory_flops(heads, head_dim, config, batch, length)
    moved = memory_bytes(heads, head_dim, batch, length, DTYPES[dtype].itemsize)
    return {**found, **rates(found, batch * length, flops, moved, where, dtype)}


def beside_dual(rows: Sequence[Row]) -> list[Row]:
    """The rows with each backend's speed and memory over those of the dual form in the same case."""
    dual = {_case(row): row for row in rows if row["backend"] == "dual" and "outcome" not in row}
    result = []
    for row in rows:
        base = dual.get(_case(row))
        if base is not None and "outcome" not in row:
            speed = (base["forward_s"] + base["backward_s"]) / (row["forward_s"] + row["backward_s"])
            row = {**row, "speed_over_dual": speed, "memory_over_dual": row["peak_bytes"] / max(base["peak_bytes"], 1)}
        result.append(row)
    return result


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("length", "batch", "expansion", "chunk_size", "heads", "head_dim", "depth"))
