"""`tools.bench long`: time a token and peak memory of one training step by segments, against the sequence's length."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model import ModelConfig, TitansLM
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.process import exit_now, initialize, shutdown
from parallel.segments import Segments
from pretrain.data import Batch
from pretrain.devices import peak_memory_bytes
from tools.command import positive_int

# Resident memory is a process's high-water mark, so each step runs in a process of its own.
_WORKER = """
import json, sys
from tools.bench.long import work
work(json.loads(sys.argv[1]))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench long`."""
    parser.add_argument(
        "--variants", nargs="+", default=["mac", "mag", "lmm", "transformer"], metavar="NAME",
        choices=("mac", "mag", "mal", "lmm", "transformer"), help="models; the transformer's attention is full",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=positive_int, nargs="+", default=[65_536, 2_097_152], metavar="N", help="tokens in the row"
    )
    parser.add_argument(
        "--full-attention-up-to", type=positive_int, default=32_768, metavar="N",
        help="longest row of the transformer, whose time a token grows with it",
    )  # fmt: skip
    parser.add_argument(
        "--gradients", nargs="+", choices=("exact", "truncated"), default=["exact", "truncated"],
        help="through the whole row, or stopped behind every segment",
    )  # fmt: skip
    parser.add_argument("--segment-length", type=positive_int, default=4096, metavar="N", help="tokens in a segment")
    parser.add_argument(
        "--boundary-states", choices=("device", "host", "disk"), default="disk", help="where states wait for gradients"
    )
    parser.add_argument("--dim", type=positive_int, default=64, help="width of the model")
    parser.add_argument("--heads", type=positive_int, default=2, help="number of heads")
    parser.add_argument("--layers", type=positive_int, default=2, help="number of layers")
    parser.add_argument("--chunk-size", type=positive_int, default=64, help="tokens in a chunk of the memory")
    parser.add_argument("--window", type=positive_int, default=64, help="attention window, or the MAC's segment")
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads")


def model_config(variant: str, *, dim: int, heads: int, layers: int, chunk_size: int, window: int) -> ModelConfig:
    """The model of a variant at the benchmark's size, over bytes."""
    fields: dict[str, Any] = {
        "vocab_size": 256,
        "dim": dim,
        "num_heads": heads,
        "num_layers": layers,
        "ffn_dim": 2 * dim,
    }
    if variant != "transformer":
        fields["memory"] = {"chunk": chunk_size}
    if variant == "mac":
        fields["segment"] = window
    elif variant in ("mag", "mal"):
        fields["window"] = window
    return ModelConfig.preset(f"{variant}-tiny", **fields)


def measure(
    *, variant: str, length: int, gradient: str, segment_length: int, boundary_states: str, threads: int, **sizes: int
) -> dict[str, Any]:
    """One step of AdamW on a row of drawn bytes: seconds, peak bytes of the process, loss, gradient norm, size."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    world = initialize("auto")
    model = TitansLM(model_config(variant, **sizes))
    segment = min(segment_length, length)
    with TemporaryDirectory() as folder:
        engine = Engine(
            model,
            torch.optim.AdamW(model.parameters(), lr=0.0),
            ParallelConfig(zero_stage=1, precision="fp32"),
            world,
            micro_batch_size=1,
            accumulation=1,
            gradient_clip=1.0,
            segments=Segments(
                length=segment,
                count=length // segment,
                truncate_every=None if gradient == "exact" else 1,
                boundary_states=boundary_states,
                folder=Path(folder),
            ),
        )
        tokens = torch.randint(256, (1, length + 1))
        start = time.perf_counter()
        result = engine.train_step([Batch(tokens[:, :-1], tokens[:, 1:])], 1e-3)
        loss, norm = float(result.loss), float(result.grad_norm)
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_bytes": peak_memory_bytes(world.device),
        "loss": loss,
        "gradient_norm": norm,
        "parameters": engine.num_parameters,
    }


def work(settings: dict[str, Any]) -> None:
    """The worker process: measures, prints the result as JSON, and ends."""
    print(json.dumps(measure(**settings)))
    shutdown()
    exit_now(0)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measures every model at every length, prints the table, returns settings and results."""
    for length in arguments.lengths:
        if length > arguments.segment_length and length % arguments.segment_length:
            raise SystemExit(f"--lengths {length}: not a multiple of --segment-length {arguments.segment_length}")
    names = ("segment_length", "boundary_states", "dim", "heads", "layers", "chunk_size", "window", "threads")
    settings = {name: getattr(arguments, name) for name in names}
    results = []
    for variant in arguments.variants:
        for gradient in arguments.gradients:
            for length in sorted(arguments.lengths):
                if variant == "transformer" and length > arguments.full_attention_up_to:
                    print(f"{variant}, {length:,} tokens: over --full-attention-up-to, left out", file=sys.stderr)
                    continue
                point = {"variant": variant, "length": length, "gradient": gradient}
                print(f"{variant}, {length:,} tokens, {gradient} gradients ...", file=sys.stderr, flush=True)
                worker = [sys.executable, "-c", _WORKER, json.dumps({**settings, **point})]
                output = subprocess.run(worker, check=True, stdout=subprocess.PIPE, text=True).stdout
                results.append({**point, **json.loads(output.splitlines()[-1])})
    # Wide enough for its columns also where the output is no terminal.
    Console(width=max(100, Console().width)).print(_table(results))
    return settings, results


def _table(results: list[dict[str, Any]]) -> Table:
    """A line for each step; ratios are to the shortest row of the same model and gradients."""
    table = Table("model", "gradients", "tokens", "seconds", "us a token", "ratio", "peak MB", "ratio")
    for row in results:
        alike = [r for r in results if (r["variant"], r["gradient"]) == (row["variant"], row["gradient"])]
        first = min(alike, key=lambda r: r["length"])
        per_token = row["seconds"] / row["length"]
        table.add_row(
            row["variant"], row["gradient"], f"{row['length']:,}", f"{row['seconds']:.1f}", f"{per_token * 1e6:.1f}",
            f"{per_token / (first['seconds'] / first['length']):.2f}", f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['peak_bytes'] / first['peak_bytes']:.2f}",
        )  # fmt: skip
    return table
