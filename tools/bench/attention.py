"""`tools.bench attention`: time, TFLOP/s and peak memory of attention, forward and backward, by window and length."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from kernels.attention import BACKENDS, Prefix, attention
from tools.bench.benchmark import Benchmark
from tools.bench.cases import Row, grid, run_cases
from tools.bench.clock import DTYPES, add_device_arguments, device_settings, forward_and_backward
from tools.bench.roofline import attention_bytes, attention_flops, rates, visible_pairs
from tools.bench.tables import HEADS, PEAK, RATES, TIMES, Column, Presentation, whole
from tools.command import not_negative_int, positive_int

FULL = 0
"""`--window 0`: every token sees all before it."""
WARM_UP_TOKENS = 64

PRESENTATION = Presentation(
    title="Attention: forward and backward",
    case=(
        Column("tokens", "length", whole),
        Column("window", "window", lambda window: "all" if window == FULL else whole(window)),
        Column("backend", "backend"),
        Column("persistent tokens", "prefix"),
        *HEADS,
    ),
    found=(
        *TIMES,
        *RATES,
        PEAK,
    ),
    note="TFLOP/s counts the pairs of tokens that see each other, backward twice the forward. Roofline: the least time "
    "that the device's peaks allow for these operations, and for reading and writing the inputs, the output and their "
    "gradients once. n/a: no peak is known for the device.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench attention`."""
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=[1024, 4096], help="tokens in a row")
    parser.add_argument(
        "--window",
        type=not_negative_int,
        nargs="+",
        default=[1024, FULL],
        metavar="TOKENS",
        help="tokens that a token sees, itself included; 0 for all",
    )
    parser.add_argument("--prefix", type=not_negative_int, default=0, help="persistent tokens, which every token sees")
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1], metavar="ROWS", help="rows")
    parser.add_argument("--heads", type=positive_int, default=4, help="number of heads")
    parser.add_argument("--head-dim", type=positive_int, default=64, help="width of a head")
    parser.add_argument(
        "--backends",
        choices=BACKENDS,
        nargs="+",
        help="of kernels.attention (default: on a GPU all but math, which is quadratic; on a CPU sdpa)",
    )
    add_device_arguments(parser)


def prepare(arguments: argparse.Namespace) -> Benchmark:
    """The benchmark that the options describe."""
    settings = device_settings(arguments)
    fused = [backend for backend in BACKENDS if backend not in ("auto", "math")]
    backends = arguments.backends or (fused if settings["device"] == "cuda" else ["sdpa"])
    shape = {"prefix": arguments.prefix, "heads": arguments.heads, "head_dim": arguments.head_dim}
    cases = grid({"length": arguments.lengths, "window": arguments.window, "batch": arguments.batch})
    cases = [{"backend": backend, **case, **shape} for case in cases for backend in backends]

    def rows(deadline: float | None) -> Iterator[Row]:
        return run_cases("tools.bench.attention:measure", cases, settings, deadline=deadline)

    return Benchmark("attention", {**settings, **shape, "backends": backends}, rows)


def measure(
    *,
    backend: str,
    length: int,
    window: int,
    prefix: int,
    batch: int,
    heads: int,
    head_dim: int,
    device: str,
    dtype: str,
    threads: int,
    repeats: int,
) -> dict[str, Any]:
    """Fastest forward and backward in seconds, growth of memory in bytes over the inputs' own, and rates from them."""
    torch.set_num_threads(threads)
    where, kind = torch.device(device), DTYPES[dtype]
    sees = window or None

    def measured(length: int, repeats: int) -> dict[str, Any]:
        torch.manual_seed(0)
        shape = (batch, length, heads, head_dim)
        q, k, v = (torch.randn(shape, device=where, dtype=kind, requires_grad=True) for _ in range(3))
        always = [
            torch.randn(prefix, heads, head_dim, device=where, dtype=kind, requires_grad=True)
            for _ in range(2 if prefix else 0)
        ]
        persistent = Prefix(q, *always) if prefix else None
        call = lambda: attention(q, k, v, window=sees, prefix=persistent, backend=backend)  # noqa: E731
        return forward_and_backward(call, [q, k, v, *always], where, repeats)

    # The first call loads libraries and, on a GPU, chooses kernels for the very shapes.
    measured(length if device == "cuda" else min(length, WARM_UP_TOKENS), 1)
    found = measured(length, repeats)
    flops = attention_flops(heads, head_dim, batch, visible_pairs(length, sees, prefix))
    moved = attention_bytes(heads, head_dim, batch, length, kind.itemsize)
    return {**found, **rates(found, batch * length, flops, moved, where, dtype)}
