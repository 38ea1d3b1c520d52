"""A suite of trials that take seconds, for the tests of `python -m tools.trials run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tools.trials.suite import Suite, load_suite

RECIPE: dict[str, Any] = {
    "name": "base",
    "folder": "runs/base",
    "model": {
        "preset": "lmm-tiny",
        "vocab_size": 96,
        "dim": 16,
        "num_layers": 1,
        "num_heads": 1,
        "ffn_dim": 16,
        "memory": {"depth": 1, "chunk": 16},
    },
    "data": {
        "kind": "synthetic",
        "num_workers": 0,
        "task": {"kind": "recall", "num_pairs": 4, "num_queries": 4, "filler": 8},
    },
    "training": {"tokens": 3072, "sequence_length": 32, "batch_tokens": 64, "micro_batch_size": 2},
    "parallel": {"zero_stage": 1, "precision": "fp32", "device": "cpu"},
    "evaluation": {"every_tokens": 1024, "tokens": 128},
    "checkpoint": {"every_tokens": 512, "keep": 1},
    "logging": {"every_steps": 2, "memory_every_steps": 8},
}
PLAIN, WILD = "plain", "wild"
STUDY: dict[str, Any] = {
    "title": "Recall, far too short",
    "recipe": "base.yaml",
    "seeds": [0, 1],
    "probes": {"as trained": {}, "further apart": {"task": {"filler": 40}, "rows": 20}},
    "metric": "accuracy",
    "trials": {PLAIN: None, WILD: {"optimizer.lr": 1e30, "optimizer.gradient_clip": 0.0}},
}
TEXT_STUDY: dict[str, Any] = {
    "title": "Text longer than in training",
    "recipe": "text.yaml",
    "seeds": [0],
    "text": True,
    "probes": {"longer": {"context": 256, "tokens": 1000}},
    "metric": "loss",
    "trials": {PLAIN: None},
}
TEXT_SIZES = {"vocab_size": 400, "train_bytes": 20000, "validation_bytes": 8000}


def write_suite(folder: Path, text: dict[str, Any] | None = None, **studies: dict[str, Any]) -> Path:
    """A suite file and its recipes; `studies` are changes to STUDY."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(RECIPE))
    of_text = {**RECIPE, "data": {"num_workers": 0}, "model": {**RECIPE["model"], "vocab_size": 400}}
    (folder / "text.yaml").write_text(yaml.safe_dump(of_text))
    content: dict[str, Any] = {"studies": {name: {**STUDY, **changes} for name, changes in studies.items()}}
    if text is not None:
        content["text"] = text
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def load(path: Path) -> Suite:
    """The suite of a file, with text at a place where there is none."""
    return load_suite(path, (path.parent / "train", path.parent / "validation"))
