"""`tools.bench train`: tokens a second, share of the device's peak, and peak memory of training steps."""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model import ModelConfig, TitansLM
from model.compiled import compile_parts
from model.flops import flops_per_token
from model.presets import PRESETS
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.mesh import Mesh
from parallel.process import World, initialize
from pretrain.devices import peak_flops, peak_memory_bytes
from pretrain.errors import UserError
from pretrain.optimizer import OptimizerConfig, build_optimizer
from tools.bench.backends import add_backend_arguments, backend_settings, computed_by, set_backends
from tools.bench.benchmark import Benchmark
from tools.bench.cases import Row, grid, run_cases
from tools.bench.clock import DTYPES, add_device_arguments, device_settings, seconds_of
from tools.bench.plain_loop import PlainLoop
from tools.bench.tables import Column, Presentation, digits, percent, whole
from tools.command import positive_int

LEARNING_RATE = 1e-4
ENGINE, PLAIN = "engine", "plain"

PRESENTATION = Presentation(
    title="Training steps",
    case=(
        Column("model", "preset"),
        Column("tokens", "length", whole),
        Column("batch", "batch"),
        Column("loop", "loop"),
        Column("parts", "parts"),
    ),
    found=(
        Column("tokens/s", "tokens_per_second", whole),
        Column("s a step", "seconds_per_step", digits),
        Column("MFU", "mfu", percent),
        Column("MFU without inner updates", "mfu_without_memory", percent),
        Column("TFLOP/s", "tflops", digits),
        Column("peak GB", "peak_bytes", lambda value: digits(value / 1e9)),
        Column("activations", "activations"),
        Column("memory by", "memory_backend"),
        Column("attention by", "attention_backend"),
        Column("parameters M", "parameters", lambda value: digits(value / 1e6)),
    ),
    note="A step is forward, backward, clipping and AdamW on random tokens, one device. Loop: engine is the training's "
    "own, on DeepSpeed; plain is torch alone with fp32 master weights. MFU counts model operations as training does, "
    "with and without the memory's inner updates; n/a: no peak is known for the device. Activations: kept, or "
    "recomputed in the backward pass, which MFU does not count. Parts: the small operations between products, compiled "
    "or not. Memory and attention: the backends that computed them; n/a: the model has none, or an older record does "
    "not say.",
)


class RandomBatch(NamedTuple):
    """Tokens and targets, int64 [B, T]; no document begins in them."""

    tokens: Tensor
    targets: Tensor
    resets: None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.bench train`."""
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=PRESETS,
        default=["mag-tiny", "transformer-tiny"],
        metavar="NAME",
        help="models, VARIANT-SIZE as in recipes, such as mag-340m (default: mag-tiny transformer-tiny)",
    )
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=[1024], help="tokens in a row")
    parser.add_argument(
        "--batch-tokens",
        type=positive_int,
        nargs="+",
        default=[4096],
        metavar="TOKENS",
        help="tokens of a step; one row where a row has more",
    )
    parser.add_argument("--steps", type=positive_int, default=3, help="steps that are timed together, after two others")
    parser.add_argument(
        "--loop",
        choices=("auto", ENGINE, PLAIN),
        default="auto",
        help="what takes the steps: the training's engine, or plain torch; auto: the engine where there is DeepSpeed",
    )
    parser.add_argument(
        "--activations",
        choices=("auto", "kept", "recomputed"),
        default="auto",
        help="whether the backward pass recomputes layers; auto: where keeping them does not fit into the GPU's memory",
    )
    add_backend_arguments(parser)
    parser.add_argument("--compile", action="store_true", help="as parallel.compile: small operations are fused")
    add_device_arguments(parser, repeats=1)


def prepare(arguments: argparse.Namespace) -> Benchmark:
    """The benchmark that the options describe. Raises UserError for an engine that is not installed."""
    installed = importlib.util.find_spec("deepspeed") is not None
    loop = arguments.loop if arguments.loop != "auto" else (ENGINE if installed else PLAIN)
    if loop == ENGINE and not installed:
        raise UserError("--loop engine: DeepSpeed is not installed; install requirements.txt, or give --loop plain")
    settings = {**device_settings(arguments), "steps": arguments.steps, "activations": arguments.activations}
    settings |= backend_settings(arguments)
    parts = "compiled" if arguments.compile else "as they are"
    cases = grid({"preset": arguments.presets, "length": arguments.lengths, "batch_tokens": arguments.batch_tokens})
    cases = [
        {"preset": case["preset"], "length": case["length"], "batch": batch_of(case), "loop": loop, "parts": parts}
        for case in cases
    ]

    def rows(deadline: float | None) -> Iterator[Row]:
        return run_cases("tools.bench.train:measure", cases, settings, deadline=deadline)

    return Benchmark("train", settings, rows)


def batch_of(case: Row) -> int:
    """Rows of a step."""
    return max(1, case["batch_tokens"] // case["length"])


def measure(
    *,
    preset: str,
    length: int,
    batch: int,
    loop: str,
    device: str,
    dtype: str,
    threads: int,
    repeats: int,
    steps: int,
    activations: str,
    parts: str = "as they are",
    memory_backend: str = "auto",
    attention_backend: str = "auto",
) -> dict[str, Any]:
    """Speed and peak memory of `steps` steps, the fastest of `repeats` times; two others come first."""
    torch.set_num_threads(threads)
    sizes = {"length": length, "batch": batch, "loop": loop, "device": device, "dtype": dtype}
    sizes |= {"parts": parts, "memory_backend": memory_backend, "attention_backend": attention_backend}
    timing = {"repeats": repeats, "steps": steps}
    try:
        return _measure(preset, **sizes, **timing, recompute=activations == "recomputed")
    except torch.OutOfMemoryError:
        if activations != "auto":
            raise
    # Outside the handler, whose error holds on to the failed attempt's tensors.
    gc.collect()
    torch.cuda.empty_cache()
    return _measure(preset, **sizes, **timing, recompute=True)


def _measure(
    preset: str,
    *,
    length: int,
    batch: int,
    loop: str,
    device: str,
    dtype: str,
    repeats: int,
    steps: int,
    recompute: bool,
    parts: str,
    memory_backend: str,
    attention_backend: str,
) -> dict[str, Any]:
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    config = ModelConfig.preset(preset)
    torch.manual_seed(0)
    with where:
        model = TitansLM(config)
    model.set_activation_checkpointing(recompute)
    if parts == "compiled":
        compile_parts(model)
    asked = {"memory_backend": memory_backend, "attention_backend": attention_backend}
    set_backends(model, **asked)
    parameters = model.num_parameters()
    step, end = _steps(model, loop, where, dtype, batch)
    tokens = torch.randint(config.vocab_size, (batch, length + 1), device=where)
    data = RandomBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    for _ in range(2):  # the first allocates, and compiles kernels
        step(data)
    seconds = min(seconds_of(lambda: [step(data) for _ in range(steps)], where)[0] for _ in range(repeats)) / steps
    peak_bytes = peak_memory_bytes(where)
    end()
    speed = batch * length / seconds
    flops, peak = flops_per_token(config, length), peak_flops(where, dtype)
    return {
        "tokens_per_second": speed,
        "seconds_per_step": seconds,
        "tflops": speed * flops.total / 1e12,
        "mfu": None if peak is None else speed * flops.total / peak,
        "mfu_without_memory": None if peak is None else speed * flops.model / peak,
        "peak_bytes": peak_bytes,
        "activations": "recomputed" if recompute else "kept",
        "parameters": parameters,
        **computed_by(config, **asked, rows=batch, length=length, device=where, dtype=DTYPES[dtype]),
    }


def _steps(
    model: TitansLM, loop: str, device: torch.device, dtype: str, batch: int
) -> tuple[Callable[[RandomBatch], Any], Callable[[], None]]:
    """A function that takes one optimizer step, and one that lets go of all."""
    recipe = OptimizerConfig(lr=LEARNING_RATE)
    if loop == PLAIN:
        plain = PlainLoop(model, recipe, device, dtype)
        return lambda data: plain.train_step(data.tokens, data.targets, LEARNING_RATE), lambda: None
    world = _world(device.type)
    engine = Engine(
        model.to(world.device),
        build_optimizer(model, recipe, world.device),
        ParallelConfig(precision=dtype, device=device.type),
        Mesh.data_parallel(world),
        micro_batch_size=batch,
        accumulation=1,
        gradient_clip=recipe.gradient_clip,
    )
    return lambda data: engine.train_step([data], LEARNING_RATE), engine.destroy


@functools.cache
def _world(device: str) -> World:
    """This process's group of one, which it can join only once."""
    return initialize(device)
