"""Options of benchmarks of models: which backends are to compute the memory and the attention, and which did."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kernels.attention import BACKENDS as ATTENTION_BACKENDS
from kernels.memory.choice import BACKENDS as MEMORY_BACKENDS
from model import ModelConfig, TitansLM
from model.attention import explain_attention_backend
from model.memory import explain_memory_backend


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """`--memory-backend` and `--attention-backend`."""
    parser.add_argument(
        "--memory-backend", choices=MEMORY_BACKENDS, default="auto", help="what computes the memories (default: auto)"
    )
    parser.add_argument(
        "--attention-backend",
        choices=ATTENTION_BACKENDS,
        default="auto",
        help="what computes the attention (default: auto)",
    )


def backend_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as keyword arguments of a measurement."""
    return {"memory_backend": arguments.memory_backend, "attention_backend": arguments.attention_backend}


def set_backends(model: TitansLM, *, memory_backend: str, attention_backend: str) -> None:
    """Has the model compute by them."""
    model.set_memory_backend(memory_backend)
    model.set_attention_backend(attention_backend)


def computed_by(
    config: ModelConfig,
    *,
    memory_backend: str,
    attention_backend: str,
    rows: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, str | None]:
    """The names of the backends that compute training steps where these are asked for; None for what a model lacks."""
    if device.type == "cuda" and device.index is None:  # as tensors say it, so that no self-test is run a second time
        device = torch.device("cuda", torch.cuda.current_device())
    where = {"device": device, "dtype": dtype}
    found: dict[str, str | None] = {"memory_backend": None, "attention_backend": None}
    if config.memory is not None:
        found["memory_backend"] = _name(explain_memory_backend(config, memory_backend, **where))
    if config.has_attention:
        explanation = explain_attention_backend(config, attention_backend, rows=rows, length=length, **where)
        found["attention_backend"] = _name(explanation)
    return found


def _name(explanation: str) -> str:
    return explanation.partition(":")[0]
