"""The parts of `tools.bench gpu`: their commands at full and at toy sizes, and their shares of the budget."""

from __future__ import annotations

import sys
from dataclasses import dataclass

TESTS = ("tests/kernels", "tests/model", "tests/tools/bench")
"""Folders whose tests marked `gpu` are run: they need neither DeepSpeed nor what reads data."""


@dataclass(frozen=True)
class Part:
    """One part: a command in a process of its own."""

    name: str
    share: float
    """Of the budget, beside the others' shares; nothing that was measured."""
    arguments: tuple[str, ...]
    """Of `python -m tools.bench`, or of pytest for the tests."""
    small: tuple[str, ...]
    """The same at toy sizes, for a CPU."""
    purpose: str

    @property
    def has_record(self) -> bool:
        """Whether the part writes a record."""
        return self.name != "tests"

    def command(self, *, device: str, small: bool) -> list[str]:
        """The words of the command; the budget and the record's place are left to the caller."""
        words = list(self.small if small else self.arguments)
        if not self.has_record:
            return [sys.executable, "-m", "pytest", *words]
        return [sys.executable, "-m", "tools.bench", *words, "--device", device]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SMALL_MEMORY = "--heads 2 --head-dim 16 --expansion 2 --chunk-size 16 --repeats 1 --threads 1"

# What matters most comes first: a budget that runs out cuts off the end. Of each list the first value is first too.
PARTS = (
    Part(
        "correctness",
        1.3,
        _words("correctness --depth 2 1 --expansion 4 1 --chunk-size 64 16 128"),
        _words("correctness --depth 2 --expansion 1 --chunk-size 16 --head-dim 16 --threads 1"),
        "outputs, states and gradients of every kernel beside float64",
    ),
    Part(
        "tests",
        0.8,
        _words("-q -m gpu -p no:cacheprovider " + " ".join(TESTS)),
        _words("-q -m gpu -p no:cacheprovider tests/tools/bench"),
        "the tests that need a GPU",
    ),
    Part(
        "memory",
        2.4,
        _words(
            "memory --heads 16 --head-dim 64 --expansion 2 4 1 --chunk-size 64 128 256 32 --batch 8 32 1 "
            "--lengths 4096 32768"
        ),
        _words(f"memory --lengths 48 {_SMALL_MEMORY}"),
        "TFLOP/s of the memory, each backend, 4K and 32K tokens",
    ),
    Part(
        "train",
        2.0,
        _words(
            "train --presets mag-340m transformer-340m mac-340m mal-340m lmm-340m mag-760m transformer-760m mac-760m "
            "mal-760m lmm-760m --lengths 4096 32768 --batch-tokens 32768"
        ),
        _words("train --presets mag-tiny --lengths 32 --batch-tokens 64 --steps 1 --threads 1"),
        "tokens a second and MFU of training steps, 4K and 32K tokens",
    ),
    Part(
        "train-triton",
        0.4,
        _words("train --presets mag-340m --lengths 4096 --batch-tokens 32768 --memory-backend triton"),
        _words("train --presets mag-tiny --lengths 8 --batch-tokens 8 --steps 1 --threads 1 --memory-backend triton"),
        "the same of one model whose memory the kernels compute, which auto leaves to the dual form",
    ),
    Part(
        "decode",
        0.8,
        _words(
            "decode --presets transformer-340m mag-340m mac-340m mal-340m lmm-340m --context 131072 --tokens 128 "
            "--state made"
        ),
        _words("decode --presets transformer-tiny mag-tiny --context 96 --tokens 2 --state made --threads 1"),
        "generation behind 128K tokens, beside full attention",
    ),
    Part(
        "attention",
        0.4,
        _words("attention --heads 16 --batch 4 --lengths 4096 32768 --window 1024 0 --prefix 16"),
        _words("attention --heads 2 --head-dim 16 --lengths 48 --window 16 --prefix 2 --repeats 1 --threads 1"),
        "TFLOP/s of attention, in a window and over all",
    ),
    Part(
        "against",
        0.6,
        _words("memory --against titans-pytorch --heads 16 --batch 1 --rounds 2"),
        _words(f"memory --against titans-pytorch --lengths 32 --exact-lengths 16 --rounds 1 {_SMALL_MEMORY}"),
        "the memory beside titans-pytorch, where it is installed",
    ),
)
