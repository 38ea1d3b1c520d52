"""It learns: a MAC of a million parameters fits 64 KB of program text to under half a bit for each byte."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from tests.training_cases import events, pretrain
from tools.documents import DocumentReader
from tools.shards.build import build
from tools.tokenizer import train

TEXT_BYTES = 65536
VOCABULARY = 2048
STEPS, ROWS, LENGTH = 140, 16, 128


@pytest.mark.slow
def test_a_small_mac_fits_64_kilobytes_of_text(tmp_path: Path) -> None:
    """The rate stays high for most of the run: after 100 steps 0.57 bits, where a cosine over 150 steps was at 0.71."""
    text = Path(argparse.__file__).read_bytes()[:TEXT_BYTES].decode(errors="strict")
    (tmp_path / "text.txt").write_text(text)
    reader = DocumentReader([tmp_path / "text.txt"])
    (tmp_path / "tokenizer.model").write_bytes(train(reader, VOCABULARY))
    build(reader, tmp_path / "tokenizer.model", tmp_path / "shards", shard_tokens=10**6, validation_fraction=0.0)
    batch = ROWS * LENGTH
    shards = str(tmp_path / "shards" / "train")
    recipe = {
        "name": "learning",
        "folder": str(tmp_path / "run"),
        "model": {"preset": "mac-tiny", "vocab_size": VOCABULARY},
        "data": {"train": shards, "validation": shards},
        "training": {
            "tokens": STEPS * batch,
            "sequence_length": LENGTH,
            "batch_tokens": batch,
            "micro_batch_size": ROWS,
        },
        "optimizer": {"lr": 4e-3, "weight_decay": 0.0},
        "schedule": {"kind": "wsd", "warmup_tokens": 20 * batch, "decay_tokens": 40 * batch, "min_lr_ratio": 0.05},
        "parallel": {"zero_stage": 1, "precision": "fp32", "device": "cpu"},
        "evaluation": {"every_tokens": 70 * batch, "tokens": None},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    pretrain(path, timeout=900, threads=2)
    reached = {event["step"]: event["bits_per_byte"] for event in events(tmp_path / "run", "eval")}
    assert reached[STEPS] < 0.5, reached
