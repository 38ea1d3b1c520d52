"""The neural memory beside the best-known public implementation, layer against layer, taking turns."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernels.memory import neural_memory
from model import ModelConfig
from model.memory import MemoryLayer, activation_scale
from pretrain.errors import UserError
from tools.bench.benchmark import Benchmark
from tools.bench.cases import FAILED, Row, run_cases
from tools.bench.clock import DTYPES, forward_and_backward
from tools.bench.memory_inputs import inputs_of
from tools.bench.record import RIVAL
from tools.bench.roofline import memory_config
from tools.bench.tables import HEADS, MEMORIES, PEAK, TIMES, Column, Presentation, times, whole
from tools.command import positive_int

LAYER = "mnemosyne, layer"
MEMORY = "mnemosyne, memory alone"

PRESENTATION = Presentation(
    title=f"The neural memory beside {RIVAL}: forward and backward",
    case=(
        Column("implementation", "implementation"),
        Column("tokens", "length", whole),
        Column(f"chunk of {RIVAL}", "rival_chunk_size"),
        *HEADS,
        *MEMORIES,
    ),
    found=(
        *TIMES,
        PEAK,
        Column(f"speed over {RIVAL}", "speed_over_rival", times),
        Column(f"memory over {RIVAL}", "memory_over_rival", times),
    ),
    note=f"Layers take tokens of the model's width to tokens of that width, projections, gates and norms included: "
    f"those of {RIVAL} cannot be separated. Its memory is a plain network (mem_model_norm_add_residual=False) with "
    "momentum and one learned network a head; it writes once a chunk, by gates averaged over the chunk, and takes all "
    "gradients at the initial weights (its default). Mnemosyne's reads see every token's write whatever the chunk. The "
    "processes took turns; of every implementation the fastest forward and backward and the largest memory count. "
    "Memory is what tensors held at once beyond the inputs and parameters, gradients included, in a run of its own.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the comparison."""
    parser.add_argument(
        "--against",
        choices=[RIVAL],
        help="compare with this package instead, in turns; it must be installed (pip install titans-pytorch==0.5.5)",
    )
    parser.add_argument(
        "--exact-lengths",
        type=positive_int,
        nargs="*",
        metavar="TOKENS",
        help="with --against: tokens in a row where the other reads at every token, its chunk 1 (default: 1024)",
    )
    parser.add_argument("--rounds", type=positive_int, help="with --against: turns of each (default: 3)")


def prepare(arguments: argparse.Namespace, settings: dict[str, Any]) -> Benchmark:
    """The comparison that the options describe. Raises UserError where the other package is missing."""
    try:
        version = importlib.metadata.version(RIVAL)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"--against {RIVAL}: it is not installed; pip install {RIVAL}==0.5.5") from error
    for option in ("batch", "expansion", "chunk_size"):
        if len(getattr(arguments, option)) > 1:
            raise UserError(f"--{option.replace('_', '-')}: give one value with --against")
    names = ("heads", "head_dim", "depth")
    shape = {name: getattr(arguments, name) for name in names}
    shape |= {name: getattr(arguments, name)[0] for name in ("batch", "expansion", "chunk_size")}
    exact = [1024] if arguments.exact_lengths is None else arguments.exact_lengths
    compared = [(length, shape["chunk_size"]) for length in arguments.lengths or [4096]]
    compared += [(length, 1) for length in exact]
    rounds = arguments.rounds or 3
    cases = [
        {"implementation": implementation, "length": length, "rival_chunk_size": chunk, **shape}
        for length, chunk in compared
        for _ in range(rounds)
        for implementation in (RIVAL, LAYER, MEMORY)
    ]

    def rows(deadline: float | None) -> Iterator[Row]:
        # A process for each, also on a GPU: the other's caches and compiled code are nobody else's.
        return run_cases("tools.bench.rival:measure", cases, settings, together=False, deadline=deadline)

    return Benchmark("against", {**settings, **shape, "rounds": rounds, "version": version}, rows, best_of_rounds)


def measure(
    *,
    implementation: str,
    length: int,
    batch: int,
    heads: int,
    head_dim: int,
    depth: int,
    expansion: int,
    chunk_size: int,
    rival_chunk_size: int,
    device: str,
    dtype: str,
    threads: int,
    repeats: int,
) -> dict[str, Any]:
    """Fastest forward and backward in seconds, and growth of memory in bytes over inputs and parameters."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape = {"heads": heads, "head_dim": head_dim, "depth": depth, "expansion": expansion}
    chunk = rival_chunk_size if implementation == RIVAL else chunk_size
    make = {RIVAL: _rival, LAYER: _layer, MEMORY: _memory}[implementation]
    kind = DTYPES[dtype]
    call, parameters = make(chunk_size=chunk, dtype=kind, device=device, **shape)

    def measured(length: int, repeats: int) -> dict[str, Any]:
        inputs = _inputs(implementation, batch, length, heads, head_dim, kind, device)
        return forward_and_backward(lambda: call(*inputs), [*inputs, *parameters], torch.device(device), repeats)

    # The first call loads libraries and, on a GPU, compiles for the very shapes.
    measured(length if device == "cuda" else min(length, 2 * chunk_size), 1)
    found = measured(length, repeats)
    tokens = batch * length
    return {**found, "us_per_token": (found["forward_s"] + found["backward_s"]) / tokens * 1e6}


def _inputs(
    implementation: str, batch: int, length: int, heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Tokens [B, T, heads * head_dim] for a layer; q, k, v [B, T, H, D] and gates [B, T, H] for the memory alone."""
    if implementation != MEMORY:
        return [torch.randn(batch, length, heads * head_dim, device=device, dtype=dtype, requires_grad=True)]
    tokens, _ = inputs_of(batch, length, heads, head_dim, 1, 1, dtype, device)
    return tokens


_Made = tuple[Callable[..., Tensor], list[nn.Parameter]]


def _rival(
    *, heads: int, head_dim: int, depth: int, expansion: int, chunk_size: int, dtype: torch.dtype, device: str
) -> _Made:
    from titans_pytorch import NeuralMemory

    module = NeuralMemory(
        dim=heads * head_dim,
        dim_head=head_dim,
        heads=heads,
        chunk_size=chunk_size,
        momentum=True,
        mem_model_norm_add_residual=False,
        default_model_kwargs={"depth": depth, "expansion_factor": float(expansion)},
    ).to(device, dtype)
    return lambda x: module(x)[0], list(module.parameters())


def _layer(
    *, heads: int, head_dim: int, depth: int, expansion: int, chunk_size: int, dtype: torch.dtype, device: str
) -> _Made:
    memory = memory_config(depth, expansion, chunk_size)
    width = heads * head_dim
    config = ModelConfig(
        variant="lmm", vocab_size=2, dim=width, num_layers=1, num_heads=heads, ffn_dim=1, memory=memory
    )
    module = MemoryLayer(config, 1.0).to(device, dtype)
    return lambda x: module(x, None, None, False)[0], list(module.parameters())


def _memory(
    *, heads: int, head_dim: int, depth: int, expansion: int, chunk_size: int, dtype: torch.dtype, device: str
) -> _Made:
    config = memory_config(depth, expansion, chunk_size)
    _, weights = inputs_of(1, 1, heads, head_dim, depth, expansion, dtype, device)
    options = {"chunk_size": chunk_size, "step_bound": config.bound}
    options["activation_scale"] = activation_scale(config, expansion * head_dim) if depth > 1 else 1.0

    def call(*inputs: Tensor) -> Tensor:
        return neural_memory(*inputs, weights, **options)[0]

    return call, weights


def best_of_rounds(rows: Sequence[Row]) -> list[Row]:
    """A row for each implementation and length: the fastest of its turns, the most memory of them, and the ratios to
    the other package. A turn that failed makes a failure of the row.
    """
    turns: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        turns.setdefault((row["length"], row["rival_chunk_size"], row["implementation"]), []).append(row)
    best = {key: _best(found) for key, found in turns.items()}
    results = []
    for (length, chunk, _), row in best.items():
        rival = best.get((length, chunk, RIVAL), {"outcome": FAILED})
        if "outcome" not in row and "outcome" not in rival:
            speed = (rival["forward_s"] + rival["backward_s"]) / (row["forward_s"] + row["backward_s"])
            memory = row["peak_bytes"] / rival["peak_bytes"] if rival["peak_bytes"] > 0 else None
            row = {**row, "speed_over_rival": speed, "memory_over_rival": memory}
        results.append(row)
    return results


def _best(turns: Sequence[Row]) -> Row:
    """One row of an implementation's turns."""
    spoiled = [row for row in turns if "outcome" in row]
    if spoiled:
        return spoiled[0]
    seconds = [row["forward_s"] + row["backward_s"] for row in turns]
    return {
        **turns[0],
        **{name: min(row[name] for row in turns) for name in ("forward_s", "backward_s", "us_per_token")},
        "peak_bytes": max(row["peak_bytes"] for row in turns),
        "turns_s": seconds,
    }
