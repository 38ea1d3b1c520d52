"""`python -m tools.trials.probe FOLDER`: scores a trained run on the held-out rows of its probes, and writes its
result.

FOLDER is a run's of `python -m tools.trials run`. No process group is needed: the weights of the last checkpoint are
read by name.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

from model import TitansLM
from parallel.state_files import load_parameters
from pretrain.checkpoints import checkpoint_step
from pretrain.config import Recipe, load_recipe
from pretrain.data import ShardsConfig, ShardSet, SyntheticConfig
from pretrain.data.rows import IGNORE_INDEX
from pretrain.data.synthetic import HeldOutDraws
from pretrain.errors import UserError
from tools.command import run_command
from tools.export import find_checkpoint
from tools.trials.outcome import make_result
from tools.trials.results import ProbeResult, write_result
from tools.trials.runs import RECIPE_FILE, read_trial_file
from tools.trials.suite import Probe

BATCH_TOKENS = 16384
"""Tokens that are read at a time, at least a row of them."""


@torch.no_grad()
def probe_drawn(model: TitansLM, data: SyntheticConfig, probe: Probe, seed: int) -> ProbeResult:
    """Share of right answers and loss on the first `probe.rows` held-out rows of the probe's task."""
    task = SyntheticConfig.model_validate({"task": probe.task}).task
    rows = probe.rows or 0
    batch_size = min(rows, max(1, BATCH_TOKENS // task.row_tokens))
    nats, tokens, correct = 0.0, 0, 0
    for batch in HeldOutDraws(task, seed).batches(
        sequence_length=task.row_tokens, batch_size=batch_size, max_tokens=rows * task.row_tokens
    ):
        output = model(batch.tokens, targets=batch.targets, with_correct=True)
        nats += float(output.loss_sum)
        correct += int(output.correct.sum())
        tokens += int((batch.targets != IGNORE_INDEX).sum())
    return ProbeResult(loss=nats / tokens, accuracy=correct / tokens, tokens=tokens, row_tokens=task.row_tokens)


def probe_shards(model: TitansLM, data: ShardsConfig, probe: Probe) -> ProbeResult:
    """Loss, in all and by position in rows of `probe.context` tokens, on the first `probe.tokens` held-out tokens.

    Raises UserError for shards that cannot be read.
    """
    from tools.evaluate import evaluate  # late: drawn rows need no tokenizer

    if data.validation is None or probe.context is None or probe.tokens is None:
        raise UserError("data.validation, or the probe's context or tokens, is missing: run the suite again")
    rows = -(-probe.tokens // probe.context)
    shards = ShardSet.open(data.validation)
    scores = evaluate(model, shards, context=probe.context, batch_size=min(8, rows), max_tokens=probe.tokens)
    report = deque(scores, maxlen=1)[0].report()
    del report["perplexity"], report["text_bytes"]
    return ProbeResult(**report, row_tokens=probe.context)


def run_probe(model: TitansLM, recipe: Recipe, probe: Probe) -> ProbeResult:
    """The probe of whichever kind the recipe's data is."""
    if isinstance(recipe.data, SyntheticConfig):
        return probe_drawn(model, recipe.data, probe, recipe.data_seed())
    return probe_shards(model, recipe.data, probe)


def load_trained(folder: Path, recipe: Recipe) -> TitansLM:
    """The model of the run's newest checkpoint, ready to be used.

    Raises UserError where there is none that is whole, and where the training has not come to its end.
    """
    checkpoint = find_checkpoint(folder)
    steps, found = recipe.batches(1).steps, checkpoint_step(checkpoint)
    if found != steps:
        raise UserError(f"{checkpoint}: is of step {found} of {steps}; remove newer, damaged ones and train to the end")
    model = TitansLM(recipe.model)
    load_parameters(model, checkpoint)
    return model.eval()


def run(folder: Path) -> None:
    """All probes of a run, and its result. Raises UserError for a folder that holds no finished training."""
    trial = read_trial_file(folder)
    recipe = load_recipe(folder / RECIPE_FILE)
    model = load_trained(folder, recipe)
    probes = {}
    for name, probe in trial.probes.items():
        probes[name] = run_probe(model, recipe, probe)
        print(f"{name}: {probes[name].model_dump_json(exclude={'by_position'}, exclude_none=True)}", flush=True)
    write_result(folder, make_result(folder, trial, probes))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.trials.probe", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of a run whose training is done")
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments.folder))


if __name__ == "__main__":
    sys.exit(main())
