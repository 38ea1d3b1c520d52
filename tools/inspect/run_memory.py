"""`python -m tools.inspect memory`: finds the memories, measures, writes, prints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model import ModelConfig, TitansLM
from parallel.state_files import load_parameters
from pretrain.errors import UserError
from pretrain.exported import CONFIG
from pretrain.resume import MODEL_FILE
from tools.export import find_checkpoint
from tools.inspect.contents import Matrix, of_memory
from tools.inspect.memories import memory_cores
from tools.inspect.memory_page import html_page
from tools.inspect.output import numbers
from tools.model_directory import load_model_directory, require_device
from tools.result_files import require_writable, write_json, write_text
from tools.sessions import at_end, load_session


@dataclass(frozen=True)
class Memories:
    """What is looked at."""

    facts: list[tuple[str, str]]
    """Names and values: what it is, what it has read."""
    rows: list[list[Matrix]]
    """The matrices of each row of a session; of a model one row."""


@torch.no_grad()
def run_memory(arguments: argparse.Namespace) -> None:
    """The subcommand. Raises UserError for input that doesn't fit."""
    require_writable(arguments.output, arguments.json)
    if arguments.state.is_dir():
        if arguments.model is not None:
            raise UserError(f"--model is for a session; {arguments.state} is a folder and holds its own: drop it")
        found = _start(arguments)
    else:
        found = _session(arguments)
    if arguments.output is not None:
        write_text(arguments.output, html_page(f"Memory: {arguments.state.name}", found.facts, found.rows))
    if arguments.json is not None:
        write_json(arguments.json, as_json(found))
    _print(found)  # last: whoever reads it may have gone


def as_json(found: Memories) -> dict[str, Any]:
    """All numbers."""
    return {"facts": dict(found.facts), "rows": [[_fields(matrix) for matrix in row] for row in found.rows]}


def _fields(matrix: Matrix) -> dict[str, Any]:
    own = dict(matrix.fields())
    return {**own, "singular_values": numbers(matrix.singular_values), "changes": numbers(matrix.changes)}


def _start(arguments: argparse.Namespace) -> Memories:
    """The learned start of a model's or a checkpoint's memories."""
    if (arguments.state / CONFIG).is_file():
        model = load_model_directory(
            arguments.state, device=arguments.device, dtype=getattr(torch, arguments.dtype)
        ).model
        place = arguments.state
    else:
        if arguments.dtype != "float32":
            raise UserError(f"--dtype {arguments.dtype}: a checkpoint's weights are looked at as they are; drop it")
        require_device(arguments.device)
        place = find_checkpoint(arguments.state)
        model = _checkpoint_model(place).to(arguments.device)
    cores = memory_cores(model, str(place))
    starts = [core.learned() for core in cores]
    facts = [("of", f"{place}: the start that training gave the memories"), ("model", _model_text(model.config))]
    row = [
        matrix
        for layer, start in enumerate(starts)
        for matrix in of_memory(layer, start, start, [torch.zeros_like(weight) for weight in start])
    ]
    return Memories(facts, [row])


def _checkpoint_model(checkpoint: Path) -> TitansLM:
    try:
        config = ModelConfig.model_validate_json((checkpoint / MODEL_FILE).read_text(encoding="utf-8"))
        model = TitansLM(config)
        load_parameters(model, checkpoint)
    except (OSError, ValidationError, ValueError) as error:
        raise UserError(f"{checkpoint}: cannot be read: {error}") from error
    return model


def _session(arguments: argparse.Namespace) -> Memories:
    """The memories of a session's rows, after all tokens that were read."""
    if arguments.model is None:
        if not arguments.state.exists():
            raise UserError(f"{arguments.state}: no such file or folder")
        raise UserError(f"{arguments.state}: is a file: give --model, the exported model that the session belongs to")
    loaded = load_model_directory(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    cores = memory_cores(loaded.model, str(arguments.model))
    session = load_session(arguments.state, loaded.model)
    rows: list[list[Matrix]] = [[] for _ in session.state.position]
    for index, (layer, core) in enumerate(zip(session.state.layers, cores, strict=True)):
        start = core.learned()
        if layer.memory is None:
            weights, momentum = _nothing_read(start, len(rows))
        else:
            memory = at_end(layer.memory.memory, core)
            weights, momentum = memory.weights, memory.momentum
        for row, into in enumerate(rows):
            into += of_memory(index, [w[row] for w in weights], start, [s[row] for s in momentum])
    facts = [
        ("of", f"{arguments.state}: a session of {session.tokens:,} tokens"),
        ("model", f"{arguments.model}: {_model_text(loaded.config.model)}"),
    ]
    return Memories(facts, rows)


def _nothing_read(start: Sequence[Tensor], rows: int) -> tuple[list[Tensor], list[Tensor]]:
    weights = [w.expand(rows, *w.shape) for w in start]
    return weights, [torch.zeros_like(w) for w in weights]


def _model_text(config: ModelConfig) -> str:
    memory = config.memory
    return f"{config.variant}, {config.num_layers} layers, {config.num_heads} heads, memories of depth {memory.depth}"


def _print(found: Memories) -> None:
    console = Console(width=max(110, Console().width))
    for name, value in found.facts:
        console.print(f"{name}: {value}", markup=False, highlight=False)
    for number, row in enumerate(found.rows):
        title = f"row {number}" if len(found.rows) > 1 else None
        table = Table(*Matrix.titles(), title=title)
        for matrix in row:
            table.add_row(*matrix.cells())
        console.print(table)
