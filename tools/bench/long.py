"""`tools.bench long`: time a token and peak memory of one training step by segments, against the sequence's length."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from model import ModelConfig, TitansLM
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.mesh import Mesh
from parallel.process import initialize
from parallel.segments import Segments
from pretrain.devices import peak_memory_bytes
from pretrain.errors import UserError
from tools.bench.benchmark import Benchmark
from tools.bench.cases import Row, run_cases
from tools.bench.clock import chosen_device
from tools.bench.tables import Column, Presentation, digits, megabytes, times, whole
from tools.bench.train import RandomBatch
from tools.command import positive_int

CASE_SECONDS = 6 * 3600.0
"""After which a step counts as hanging: one of millions of tokens takes long."""


BASE_LENGTH = 65_536
"""Tokens of the row that others are compared with. In the shortest ones a step's fixed costs show, and a row of one
segment is not run forward twice."""


def beside_base(rows: Sequence[Row]) -> list[Row]:
    """The rows with time a token and memory over those of the row of `BASE_LENGTH` of the same model and gradients, or
    of the shortest where that was not measured.
    """
    result = []
    for row in rows:
        if "outcome" not in row:
            alike = [r for r in rows if (r["variant"], r["gradient"]) == (row["variant"], row["gradient"])]
            measured = sorted((r for r in alike if "outcome" not in r), key=lambda r: r["length"])
            base = next((r for r in measured if r["length"] == BASE_LENGTH), measured[0])
            per_token, at_base = row["seconds"] / row["length"], base["seconds"] / base["length"]
            ratios = {"time_ratio": per_token / at_base, "memory_ratio": row["peak_bytes"] / base["peak_bytes"]}
            row = {**row, "us_per_token": per_token * 1e6, "base": base["length"], **ratios}
        result.append(row)
    return result


PRESENTATION = Presentation(
    title="A training step by segments",
    case=(
        Column("model", "variant"),
        Column("gradients", "gradient"),
        Column("tokens", "length", whole),
    ),
    found=(
        Column("seconds", "seconds", digits),
        Column("us a token", "us_per_token", digits),
        Column("peak MB", "peak_bytes", megabytes),
        Column("base", "base", whole),
        Column("time over base", "time_ratio", times),
        Column("memory over base", "memory_ratio", times),
    ),
    note="Forward, backward and AdamW on one row, in a process of its own. Time is compared a token, with the row of "
    "base tokens of the same model and gradients; peak memory is the whole process's.",
    prepare=beside_base,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench long`."""
    parser.add_argument(
        "--variants", nargs="+", default=["mac", "mag", "lmm", "transformer"], metavar="NAME",
        choices=("mac", "mag", "mal", "lmm", "transformer"), help="models; the transformer's attention is full",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=positive_int, nargs="+", default=[4096, 32_768, BASE_LENGTH, 2_097_152], metavar="N",
        help="tokens in the row",
    )  # fmt: skip
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
    parser.add_argument("--dim", type=positive_int, default=32, help="width of the model")
    parser.add_argument("--heads", type=positive_int, default=1, help="number of heads")
    parser.add_argument("--layers", type=positive_int, default=1, help="number of layers")
    parser.add_argument("--chunk-size", type=positive_int, default=128, help="tokens in a chunk of the memory")
    parser.add_argument("--window", type=positive_int, default=128, help="attention window, or the MAC's segment")
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is")


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
    *,
    variant: str,
    length: int,
    gradient: str,
    segment_length: int,
    boundary_states: str,
    device: str,
    threads: int,
    **sizes: int,
) -> dict[str, Any]:
    """One step of AdamW on a row of drawn bytes: seconds, peak bytes of the process, loss, gradient norm, size."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    world = initialize(device)
    model = TitansLM(model_config(variant, **sizes))
    segment = min(segment_length, length)
    with TemporaryDirectory() as folder:
        engine = Engine(
            model,
            torch.optim.AdamW(model.parameters(), lr=0.0),
            ParallelConfig(zero_stage=1, precision="fp32"),
            Mesh.data_parallel(world),
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
        result = engine.train_step([RandomBatch(tokens[:, :-1], tokens[:, 1:])], 1e-3)
        loss, norm = float(result.loss), float(result.grad_norm)
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_bytes": peak_memory_bytes(world.device),
        "loss": loss,
        "gradient_norm": norm,
        "parameters": engine.num_parameters,
    }


def prepare(arguments: argparse.Namespace) -> Benchmark:
    """The benchmark that the options describe. Raises UserError for a length that segments do not divide."""
    for length in arguments.lengths:
        if length > arguments.segment_length and length % arguments.segment_length:
            raise UserError(f"--lengths {length}: not a multiple of --segment-length {arguments.segment_length}")
    names = ("segment_length", "boundary_states", "dim", "heads", "layers", "chunk_size", "window", "threads")
    settings = {"device": chosen_device(arguments.device).type, **{name: getattr(arguments, name) for name in names}}
    cases = [
        {"variant": variant, "length": length, "gradient": gradient}
        for variant in arguments.variants
        for gradient in arguments.gradients
        for length in sorted(arguments.lengths)
    ]
    left_out = [c for c in cases if c["variant"] == "transformer" and c["length"] > arguments.full_attention_up_to]
    for variant, length in sorted({(case["variant"], case["length"]) for case in left_out}):
        print(f"{variant}, {length:,} tokens: over --full-attention-up-to, left out", file=sys.stderr)
    cases = [case for case in cases if case not in left_out]

    def rows(deadline: float | None) -> Iterator[Row]:
        # Each step in a process of its own, also on a GPU: a process joins its group once.
        return run_cases(
            "tools.bench.long:measure", cases, settings, deadline=deadline, together=False, case_seconds=CASE_SECONDS
        )

    return Benchmark("long", settings, rows)
