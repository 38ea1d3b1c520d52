"""What evaluations write: a JSON file, TensorBoard scalars, and the name of their setting."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from pretrain.exported import read_config
from tools.command import writing
from tools.result_files import write_json


def setting_name(num_fewshot: int, fine_tuned: bool) -> str:
    """How a model was asked. Numbers of different settings do not compare."""
    shots = f"few-shot ({num_fewshot})" if num_fewshot else "zero-shot"
    return f"fine-tuned, {shots}" if fine_tuned else shots


def write_results(arguments: argparse.Namespace, report: Mapping[str, Any]) -> None:
    """Writes --json, if that was asked for: what the model is, then the report."""
    if arguments.json is None:
        return
    config = read_config(arguments.model)
    model = {"model": str(arguments.model), "step": config.step, "tokens_trained": config.tokens}
    write_json(arguments.json, {**model, **report}, indent=1)


def tensorboard_scalars(arguments: argparse.Namespace, kind: str, scalars: Mapping[str, float]) -> None:
    """Writes to --tensorboard, if that was asked for, at the step that the weights are of."""
    if arguments.tensorboard is None:
        return
    from torch.utils.tensorboard import SummaryWriter

    step = read_config(arguments.model).step
    with writing(arguments.tensorboard), SummaryWriter(str(arguments.tensorboard)) as writer:
        for name, value in scalars.items():
            writer.add_scalar(f"{kind}/{name}", value, step)
