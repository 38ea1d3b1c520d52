"""`tools.bench decode`: tokens a second and bytes held when generating behind a long context, beside a transformer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig, ModelState, TitansLM
from model.generation import PREFILL_TOKENS, TokenStream
from model.presets import PRESETS
from model.state import AttentionCache
from tools.bench.backends import add_backend_arguments, backend_settings, set_backends
from tools.bench.benchmark import Benchmark
from tools.bench.cases import Row, grid, run_cases
from tools.bench.clock import DTYPES, add_device_arguments, device_settings, seconds_of
from tools.bench.roofline import peak_bandwidth
from tools.bench.tables import Column, Presentation, digits, megabytes, milliseconds, times, whole
from tools.command import positive_int

READ, MADE = "read", "made"

PRESENTATION = Presentation(
    title="Generation behind a context",
    case=(
        Column("model", "preset"),
        Column("context", "context", whole),
        Column("batch", "batch"),
        Column("state", "state"),
    ),
    found=(
        Column("tokens/s", "tokens_per_second", whole),
        Column("ms a token", "seconds_per_token", milliseconds),
        Column("state MB a row", "state_bytes_per_row", megabytes),
        Column("state bytes a token of context", "state_bytes_per_token", digits),
        Column("weights MB", "weight_bytes", megabytes),
        Column("ms a token at best", "least_seconds_per_token", milliseconds),
        Column("context tokens/s", "prefill_tokens_per_second", whole),
        Column("speed over transformer", "speed_over_transformer", times),
        Column("state over transformer", "state_over_transformer", times),
    ),
    note="Greedy, a token at a time for all rows together; tokens/s counts all rows. State: all that is kept of the "
    "context, read: by reading random tokens, made: of the same shapes without reading most of them. At best: reading "
    "the weights and the state once a token at the peak bandwidth of the device's memory, which a cache that is copied "
    "to grow, as full attention's is here, cannot reach. n/a: not known for the device, not read, or without a "
    "transformer of the same size beside it.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench decode`."""
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=PRESETS,
        default=["transformer-tiny", "mag-tiny"],
        metavar="NAME",
        help="models, VARIANT-SIZE as in recipes; the transformer of a size is what its other variants are compared "
        "with (default: transformer-tiny mag-tiny)",
    )
    parser.add_argument("--context", type=positive_int, nargs="+", default=[8192], help="tokens read before")
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1], metavar="ROWS", help="rows")
    parser.add_argument(
        "--tokens",
        type=positive_int,
        default=128,
        help="tokens to generate; whole chunks of a memory show its mean speed",
    )
    parser.add_argument(
        "--state",
        choices=(READ, MADE),
        default=READ,
        help="how the state behind the context comes about: by reading it, or made of the same shapes (quick)",
    )
    add_backend_arguments(parser)
    add_device_arguments(parser, repeats=1)


def prepare(arguments: argparse.Namespace) -> Benchmark:
    """The benchmark that the options describe."""
    settings = {**device_settings(arguments), "tokens": arguments.tokens, **backend_settings(arguments)}
    cases = grid({"preset": arguments.presets, "context": arguments.context, "batch": arguments.batch})
    cases = [{**case, "state": arguments.state} for case in cases]

    def rows(deadline: float | None) -> Iterator[Row]:
        return run_cases("tools.bench.decode:measure", cases, settings, deadline=deadline)

    return Benchmark("decode", settings, rows, beside_transformer)


def measure(
    *,
    preset: str,
    context: int,
    batch: int,
    state: str,
    tokens: int,
    device: str,
    dtype: str,
    threads: int,
    repeats: int,
    memory_backend: str = "auto",
    attention_backend: str = "auto",
) -> dict[str, Any]:
    """Speed of generating `tokens` tokens a row behind `context` tokens, the fastest of `repeats`, and bytes held."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    where = torch.device(device)
    with where:
        model = TitansLM(ModelConfig.preset(preset)).to(DTYPES[dtype]).eval()
    set_backends(model, memory_backend=memory_backend, attention_backend=attention_backend)
    seconds, before = seconds_of(lambda: behind(model, batch, context, state == READ), where)
    prompt = torch.zeros(batch, 1, dtype=torch.int64, device=where)

    def generate(count: int) -> list[Tensor]:
        return list(TokenStream(model, prompt, max_new_tokens=count, temperature=0, state=before))

    generate(2)  # loads libraries, compiles kernels
    spent = min(seconds_of(lambda: generate(tokens), where)[0] for _ in range(repeats))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    held = sum(t.numel() * t.element_size() for _, t in before.named_tensors())
    bandwidth = peak_bandwidth(where)
    return {
        "tokens_per_second": batch * tokens / spent,
        "seconds_per_token": spent / tokens,
        "state_bytes_per_row": held / batch,
        "state_bytes_per_token": held / batch / context,
        "weight_bytes": weights,
        "least_seconds_per_token": None if bandwidth is None else (weights + held) / bandwidth,
        "prefill_tokens_per_second": batch * context / seconds if state == READ else None,
    }


@torch.no_grad()
def behind(model: TitansLM, batch: int, context: int, read: bool) -> ModelState:
    """The state after `context` random tokens: read in pieces as generation does, or made of the same shapes.

    What bounds a model's state is full after a window, a segment or a chunk; a made state has read those, up to the
    same place in its segment or chunk, and stands at the context's position. Of full attention the cache is random.
    """
    config, device = model.config, model.norm.weight.device
    grid = config.segment or (config.memory.chunk if config.memory else 1)
    span = max(config.segment or 0, config.window or 0, grid)
    length = context if read else min(context, span + (context - span) % grid)
    state = model.initial_state(batch)
    for start in range(0, length, PREFILL_TOKENS):
        size = min(PREFILL_TOKENS, length - start)
        state = model(torch.randint(config.vocab_size, (batch, size), device=device), state).state
    if length == context:
        return state
    state = replace(state, position=torch.full_like(state.position, context))
    if config.variant != "transformer" or config.window is not None:
        return state
    layers = tuple(replace(layer, attention=_filled(layer.attention, context)) for layer in state.layers)
    return replace(state, layers=layers)


def _filled(cache: AttentionCache, context: int) -> AttentionCache:
    """A cache of `context` random keys and values."""
    batch, _, heads, width = cache.k.shape
    k, v = (torch.randn(batch, context, heads, width, device=cache.k.device, dtype=cache.k.dtype) for _ in range(2))
    return replace(cache, k=k, v=v)


def beside_transformer(rows: Sequence[Row]) -> list[Row]:
    """The rows with speed and state over those of the transformer of the same size behind the same context."""
    baselines = {_case(row): row for row in rows if row["preset"].startswith("transformer-") and "outcome" not in row}
    result = []
    for row in rows:
        base = baselines.get(_case(row))
        if base is not None and "outcome" not in row:
            row = {
                **row,
                "speed_over_transformer": row["tokens_per_second"] / base["tokens_per_second"],
                "state_over_transformer": row["state_bytes_per_row"] / base["state_bytes_per_row"],
            }
        result.append(row)
    return result


def _case(row: Row) -> tuple[Any, ...]:
    size = row["preset"].partition("-")[2]
    return size, row["context"], row["batch"]
