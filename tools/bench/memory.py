"""`tools.bench memory`: time and peak memory of the neural memory, forward and backward, against length."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kernels.memory import neural_memory
from pretrain.devices import peak_resident_bytes
from tools.command import positive_int

# Resident memory is a process's high-water mark, so each length runs in a process of its own.
_WORKER = """
import json, sys
from tools.bench.memory import measure
settings = json.loads(sys.argv[2])
measure(length=64, **settings)  # loads and warms up what the first call needs
print(json.dumps(measure(length=int(sys.argv[1]), **settings)))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench memory`."""
    parser.add_argument(
        "--lengths", type=positive_int, nargs="+", default=[1024, 4096, 16384, 65536], help="tokens in a row"
    )
    parser.add_argument("--heads", type=positive_int, default=4, help="number of heads")
    parser.add_argument("--head-dim", type=positive_int, default=64, help="width of a head")
    parser.add_argument("--depth", type=int, choices=range(1, 5), default=2, help="layers of the memory, 1 to 4")
    parser.add_argument("--expansion", type=positive_int, default=4, help="hidden width of the memory over the head's")
    parser.add_argument("--chunk-size", type=positive_int, default=64, help="tokens in a chunk")
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=positive_int, default=3, help="runs of which the fastest counts")


def measure(
    length: int, heads: int, head_dim: int, depth: int, expansion: int, chunk_size: int, threads: int, repeats: int
) -> dict[str, float]:
    """Fastest forward and backward in seconds, and the growth of resident memory in bytes over the inputs' own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dims = [head_dim, *[head_dim * expansion] * (depth - 1), head_dim]
    weights = [torch.randn(heads, i, o) for i, o in zip(dims, dims[1:], strict=False)]
    weights[-1].zero_()
    shape = (1, length, heads)
    q, k, v = (torch.nn.functional.normalize(torch.randn(*shape, head_dim), dim=-1) for _ in range(3))
    gates = [torch.full(shape, value) for value in (0.005, 0.9, 0.012)]
    inputs = [x.requires_grad_() for x in (q, k, v, *gates, *weights)]
    scale = (0.3557 * head_dim * expansion) ** -0.5
    before = peak_resident_bytes()
    forward, backward = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        y, _ = neural_memory(*inputs[:6], inputs[6:], chunk_size=chunk_size, step_bound=6.0, activation_scale=scale)
        middle = time.perf_counter()
        torch.autograd.grad(y.sum(), inputs)
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return {"forward_s": min(forward), "backward_s": min(backward), "peak_bytes": peak_resident_bytes() - before}


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measures every length, prints the table, returns settings and results."""
    names = ("heads", "head_dim", "depth", "expansion", "chunk_size", "threads", "repeats")
    settings = {name: getattr(arguments, name) for name in names}
    results = []
    for length in arguments.lengths:
        worker = [sys.executable, "-c", _WORKER, str(length), json.dumps(settings)]
        output = subprocess.run(worker, check=True, stdout=subprocess.PIPE, text=True).stdout
        results.append({"length": length, **json.loads(output)})
    table = Table("tokens", "forward s", "backward s", "us a token", "peak MB over inputs", "KB a token")
    for row in results:
        total = row["forward_s"] + row["backward_s"]
        table.add_row(
            str(row["length"]), f"{row['forward_s']:.3f}", f"{row['backward_s']:.3f}",
            f"{total / row['length'] * 1e6:.1f}", f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['peak_bytes'] / row['length'] / 1e3:.2f}",
        )  # fmt: skip
    Console().print(table)
    return settings, results
