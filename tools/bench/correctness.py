"""`tools.bench correctness`: outputs, states and gradients of the kernels on this device beside float64 on the CPU."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.attention import BACKENDS as ATTENTION_BACKENDS
from kernels.attention import Prefix, attention
from kernels.memory import neural_memory
from model.memory import activation_scale
from tools.bench.benchmark import Benchmark
from tools.bench.cases import FAILED, Row, grid, run_cases
from tools.bench.clock import DTYPES, chosen_device, chosen_dtype
from tools.bench.memory import default_backends
from tools.bench.memory_inputs import inputs_of
from tools.bench.roofline import memory_config
from tools.bench.tables import Column, Presentation, whole
from tools.command import positive_int

LIMITS = {"fp32": 3e-3, "bf16": 3e-2}
"""Largest error of a tensor over its norm. fp32 leaves room for products in TF32; bf16 keeps 8 bits."""
ORACLE_TOKENS = 64
"""Up to this length the per-token reference is the oracle; beyond it the dual form in float64, which tests hold to it.
"""

PRESENTATION = Presentation(
    title="The kernels beside float64",
    case=(
        Column("kernel", "kernel"),
        Column("backend", "backend"),
        Column("inputs", "dtype"),
        Column("tokens", "length", whole),
        Column("depth", "depth"),
        Column("expansion", "expansion"),
        Column("chunk", "chunk_size"),
        Column("window", "window"),
        Column("head width", "head_dim"),
    ),
    found=(
        Column("output", "output_error", lambda value: f"{value:.1e}"),
        Column("state", "state_error", lambda value: f"{value:.1e}"),
        Column("worst gradient", "gradient_error", lambda value: f"{value:.1e}"),
        Column("limit", "limit", lambda value: f"{value:.1e}"),
    ),
    note="Norm of the difference over the norm of the float64 result, for the same rounded inputs; of the gradients "
    "the worst. n/a: the kernel has none.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench correctness`."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=tuple(DTYPES),
        help="of the inputs (default: fp32 and bf16 on a GPU, fp32 on a CPU)",
    )
    parser.add_argument("--depth", nargs="+", type=int, choices=range(1, 5), default=[2, 1, 3, 4], help="of memories")
    parser.add_argument("--expansion", type=positive_int, nargs="+", default=[4, 1], help="of memories")
    parser.add_argument("--chunk-size", type=positive_int, nargs="+", default=[64, 16, 256], help="tokens in a chunk")
    parser.add_argument("--head-dim", type=positive_int, default=64, help="width of a head")
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads")


def prepare(arguments: argparse.Namespace) -> Benchmark:
    """The checks that the options describe."""
    device = chosen_device(arguments.device)
    dtypes = arguments.dtype or (list(DTYPES) if device.type == "cuda" else [chosen_dtype("auto", device)])
    settings = {"device": device.type, "threads": arguments.threads}
    shape = {"head_dim": arguments.head_dim}
    memories = grid({
        "depth": arguments.depth, "expansion": arguments.expansion, "chunk_size": arguments.chunk_size, "dtype": dtypes,
    })  # fmt: skip
    cases = [
        {"kernel": "memory", "backend": backend, "length": _length(case["chunk_size"]), **case, "window": None, **shape}
        for case in memories
        for backend in default_backends(device.type)
        if case["depth"] > 1 or case["expansion"] == arguments.expansion[0]  # a matrix has no hidden width
    ]
    cases += [
        {"kernel": "attention", "backend": backend, "dtype": dtype, "length": 300, "depth": None, "expansion": None,
         "chunk_size": None, "window": window, **shape}
        for dtype in dtypes
        for backend in ATTENTION_BACKENDS
        if backend not in ("auto", "math")
        for window in (64, 300)
    ]  # fmt: skip

    def rows(deadline: float | None) -> Iterator[Row]:
        return run_cases("tools.bench.correctness:measure", cases, settings, together=True, deadline=deadline)

    return Benchmark("correctness", settings, rows, judged)


def _length(chunk: int) -> int:
    """Two chunks and part of a third."""
    return 2 * chunk + chunk // 2


def judged(rows: Sequence[Row]) -> list[Row]:
    """The rows, those beyond their limit as failures."""
    result = []
    for row in rows:
        errors = [row.get(name) for name in ("output_error", "state_error", "gradient_error")]
        errors = [error for error in errors if error is not None]
        # Not `>`: a result that is not a number has no error that is smaller than anything.
        if "outcome" not in row and not all(error <= row["limit"] for error in errors):
            why = f"an error of {max(errors):.1e} is beyond the limit of {row['limit']:.1e}"
            row = {**row, "outcome": FAILED, "why": why}
        result.append(row)
    return result


def measure(
    *,
    kernel: str,
    backend: str,
    dtype: str,
    length: int,
    depth: int | None,
    expansion: int | None,
    chunk_size: int | None,
    window: int | None,
    head_dim: int,
    device: str,
    threads: int,
) -> dict[str, Any]:
    """The errors of one kernel in one case."""
    torch.set_num_threads(threads)
    if kernel == "attention":
        found = _attention_results(backend, dtype, length, window, head_dim, device)
        wanted = _attention_results("math", dtype, length, window, head_dim, "cpu", exact=True)
    else:
        sizes = (length, depth, expansion, chunk_size, head_dim)
        found = _memory_results(backend, dtype, *sizes, device)
        wanted = _memory_oracle(dtype, *sizes)
    names = ("output_error", "state_error", "gradient_error")
    errors = {name: _worst(a, b) for name, a, b in zip(names, found, wanted, strict=True)}
    return {**errors, "limit": LIMITS[dtype]}


_Results = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Output, state, gradients."""


@functools.lru_cache(maxsize=1)  # the backends of a case come one after another
def _memory_oracle(rounded: str, length: int, depth: int, expansion: int, chunk_size: int, head_dim: int) -> _Results:
    """What float64 makes of inputs that were rounded."""
    backend = "reference" if length <= ORACLE_TOKENS else "dual"
    return _memory_results(backend, rounded, length, depth, expansion, chunk_size, head_dim, "cpu", exact=True)


def _memory_results(
    backend: str,
    dtype: str,
    length: int,
    depth: int,
    expansion: int,
    chunk_size: int,
    head_dim: int,
    device: str,
    exact: bool = False,
) -> _Results:
    """What a backend makes of 2 rows and heads; `exact`: in float64, of inputs rounded to `dtype`."""
    config = memory_config(depth, expansion, chunk_size)
    drawn, weights = inputs_of(2, length, 2, head_dim, depth, expansion, DTYPES[dtype], "cpu")
    torch.manual_seed(1)
    # Away from its start of zeros, where half of the gradients vanish.
    last = torch.randn(weights[-1].shape) * weights[-1].shape[1] ** -0.5
    alpha, eta, theta = (low + width * torch.rand(2, length, 2) for low, width in ((0.0, 0.1), (0.5, 0.49), (0.0, 0.1)))
    tensors = [*drawn[:3], alpha, eta, theta, *weights[:-1], last.to(weights[-1].dtype)]
    inputs = [_leaf(x, device, exact) for x in tensors]
    y, state = neural_memory(
        *inputs[:6], inputs[6:], chunk_size=chunk_size, step_bound=config.bound, backend=backend,
        activation_scale=activation_scale(config, expansion * head_dim) if depth > 1 else 1.0,
    )  # fmt: skip
    ends = [y, *state.weights, *state.momentum]
    gradients = torch.autograd.grad(ends, inputs, [_slope(x) for x in ends])
    return [y], ends[1:], list(gradients)


def _attention_results(
    backend: str, dtype: str, length: int, window: int, head_dim: int, device: str, exact: bool = False
) -> _Results:
    """What a backend makes of 2 rows and heads with 4 persistent tokens; `exact` as above."""
    torch.manual_seed(0)
    shapes = [(2, length, 2, head_dim)] * 3 + [(4, 2, head_dim)] * 2
    inputs = [_leaf(torch.randn(shape).to(DTYPES[dtype]), device, exact) for shape in shapes]
    q, k, v, always_k, always_v = inputs
    y = attention(q, k, v, window=window, prefix=Prefix(q, always_k, always_v), backend=backend)
    return [y], [], list(torch.autograd.grad(y, inputs, _slope(y)))


def _leaf(x: Tensor, device: str, exact: bool) -> Tensor:
    """The same numbers on a device, in float64 for an oracle, ready for a gradient."""
    x = x.detach().to(device)
    return (x.double() if exact else x).requires_grad_()


def _slope(x: Tensor) -> Tensor:
    """The gradient that comes from behind: numbers that differ, the same for all precisions up to rounding."""
    values = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    return values.to(x.device, x.dtype)


def _worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float | None:
    """The largest relative error of a list of tensors; infinite for one that is not finite; None for none."""
    pairs = [(a.detach().cpu().double(), b.detach()) for a, b in zip(found, wanted, strict=True)]
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]
    return max((error if error == error else float("inf") for error in errors), default=None)
