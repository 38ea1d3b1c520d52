"""`python -m tools.inspect surprise`: reads, measures, writes, prints."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain.errors import UserError
from tools.command import Progress, read_text
from tools.inspect.influence import Influence, answer_likelihoods
from tools.inspect.memories import QUANTITIES, Trace, memory_cores, trace
from tools.inspect.output import numbers
from tools.inspect.spans import spans_of
from tools.inspect.surprise_page import Page
from tools.inspect.text import Reading, read
from tools.model_directory import LoadedModel, load_model_directory
from tools.result_files import require_writable, write_json, write_text

TOP = 8
"""Tokens, or spans, that the terminal shows."""


def run_surprise(arguments: argparse.Namespace) -> None:
    """The subcommand. Raises UserError for input that doesn't fit."""
    if not arguments.answer and (arguments.query or arguments.span):
        raise UserError("--query and --span say what --answer rests on: give --answer, or drop them")
    require_writable(arguments.output, arguments.json)
    text = read_text(arguments.text, str(arguments.text))
    loaded = load_model_directory(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    name = str(arguments.model)
    memory_cores(loaded.model, name)
    try:
        reading = read(
            loaded.tokenizer, text, query=arguments.query, answer=arguments.answer, max_tokens=arguments.max_tokens
        )
    except UserError as error:
        raise UserError(f"{arguments.text}: {error}") from None
    if reading.is_cut:
        print(
            f"warning: {arguments.text}: read to its token {len(reading.text):,}; --max-tokens reads more",
            file=sys.stderr,
        )
    found = trace(loaded.model, reading.tokens, name)
    influences, answer_nats = None, 0.0
    if arguments.answer:
        spans = spans_of(reading, arguments.span)
        influences, answer_nats = measure(loaded, reading, spans, arguments.batch_size)
    facts = _facts(arguments, loaded, reading)
    if arguments.output is not None:
        page = Page(f"Surprise: {arguments.text.name}", facts, reading, found, influences, answer_nats)
        write_text(arguments.output, page.html())
    if arguments.json is not None:
        write_json(arguments.json, as_json(dict(facts), loaded, reading, found, influences, answer_nats))
    _print(found, reading, influences, answer_nats)  # last: whoever reads it may have gone


def measure(
    loaded: LoadedModel, reading: Reading, spans: list[range], batch_size: int
) -> tuple[list[Influence], float]:
    """Each span's influence on the answer, and the answer's log-likelihood in nats with all writes."""
    progress, likelihoods = Progress(len(spans) + 1), []
    every = [range(0), *spans]  # the first leaves nothing out
    for some in answer_likelihoods(loaded.model, reading.tokens, reading.answer, every, batch_size=batch_size):
        likelihoods += some
        progress.update(len(likelihoods), f"{len(likelihoods):,} of {len(every):,} readings")
    progress.close()
    answer, *others = likelihoods
    return [Influence(span, answer - other) for span, other in zip(spans, others, strict=True)], answer


def as_json(
    facts: dict[str, str],
    loaded: LoadedModel,
    reading: Reading,
    found: Trace,
    influences: list[Influence] | None,
    answer_nats: float,
) -> dict[str, Any]:
    """All numbers, by token, layer and head."""
    explained = None
    if influences is not None:
        explained = {
            "answer": [reading.answer.start, reading.answer.stop],
            "answer_nats": answer_nats,
            "spans": [{"start": x.span.start, "stop": x.span.stop, "nats": x.nats} for x in influences],
        }
    return {
        "facts": facts,
        "config": loaded.config.model.model_dump(),
        "meaning": {quantity.name: quantity.meaning for quantity in QUANTITIES},
        "tokens": reading.tokens,
        "shown": reading.shown,
        "text": [reading.text.start, reading.text.stop],
        "loss": numbers(found.losses),
        "layers": [{name: numbers(values) for name, values in layer.items()} for layer in found.layers],
        "influence": explained,
    }


def _facts(arguments: argparse.Namespace, loaded: LoadedModel, reading: Reading) -> list[tuple[str, str]]:
    config = loaded.config
    memory = config.model.memory
    facts = [
        ("model", f"{arguments.model}: {config.model.variant}, {config.model.num_layers} layers, "
         f"{config.model.num_heads} heads, memories of depth {memory.depth}, chunks of {memory.chunk} tokens"),
        ("trained", f"{config.step:,} steps, {config.tokens:,} tokens"),
        ("text", f"{arguments.text}: {len(reading.text):,} tokens{', its beginning' if reading.is_cut else ''}"),
    ]  # fmt: skip
    for name in ("query", "answer"):
        if value := getattr(arguments, name):
            facts.append((name, value))
    return facts


def _print(found: Trace, reading: Reading, influences: list[Influence] | None, answer_nats: float) -> None:
    """Means by layer, the most surprising tokens, the answer's spans."""
    console = Console(width=max(100, Console().width))
    layers = Table("layer", *(quantity.title for quantity in QUANTITIES), title="means over tokens")
    every = [found.of_layers(quantity).mean(1) for quantity in QUANTITIES]
    for index in range(len(found.layers)):
        layers.add_row(str(index), *(f"{values[index]:.4g}" for values in every))
    console.print(layers)
    surprise = found.of_layers(QUANTITIES[0]).mean(0)
    tokens = Table("token", "text", "surprise, mean of layers", "loss, nats", title="most surprising to the memory")
    for index in np.argsort(-surprise[1:], kind="stable")[:TOP] + 1:
        tokens.add_row(
            str(index), escape(repr(reading.shown[index])), f"{surprise[index]:.4g}", f"{found.losses[index]:.3f}"
        )
    console.print(tokens)
    if influences is None:
        return
    spans = Table("tokens", "influence, nats", "text", title=f"what the answer ({answer_nats:.4f} nats) rests on")
    for x in sorted(influences, key=lambda x: -abs(x.nats))[:TOP]:
        words = "".join(reading.shown[x.span.start : x.span.stop]).strip()
        spans.add_row(f"{x.span.start}:{x.span.stop}", f"{x.nats:+.4g}", escape(repr(words[:60])))
    console.print(spans)
