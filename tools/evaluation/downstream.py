"""`tools.evaluate --tasks`: downstream tasks through lm-eval, on local files, without the network.

Standard errors are those of a mean over documents; of a perplexity by the delta method (lm-eval draws bootstrap
samples, which depend on the order of documents, and so on the number of ranks).
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pretrain.errors import UserError
from tools.evaluation.benchmark_files import LIKE_LM_EVAL, TASKS, TaskData, read_task
from tools.evaluation.names import listed
from tools.evaluation.ranks import Ranks
from tools.evaluation.results import setting_name, tensorboard_scalars, write_results
from tools.model_directory import load_model_directory

HUGGINGFACE = "huggingface"
COLUMNS = (
    ("Wiki ppl", "wikitext", "word_perplexity"),
    ("LMB ppl", "lambada", "perplexity"),
    ("LMB acc", "lambada", "acc"),
    ("PIQA acc", "piqa", "acc"),
    ("Hella acc_n", "hellaswag", "acc_norm"),
    ("Wino acc", "winogrande", "acc"),
    ("ARC-e acc", "arc_easy", "acc"),
    ("ARC-c acc_n", "arc_challenge", "acc_norm"),
    ("SIQA acc", "siqa", "acc"),
    ("BoolQ acc", "boolq", "acc"),
)
"""Of Table 1 of the paper (arXiv 2501.00663): heading, task, metric. Its last is the mean of the eight accuracies."""
_ALONE = "perplexity", "acc", "acc_norm"
"""Metrics of which a document has a number; of the others it has a log-likelihood and a weight."""


def run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Evaluates, writes and prints; with several ranks each does a share, and the first one reports."""
    with ranks.agreed():
        names = listed(arguments.tasks, TASKS, "--tasks")
        _require_lm_eval()
        from tools.evaluation.tasks import build_task, num_fewshot_of

        shots = arguments.num_fewshot
        data = {name: read_task(name, arguments.data, with_examples=shots > 0) for name in names}
        tasks = {name: build_task(name, data[name], num_fewshot=shots, seed=arguments.seed) for name in names}
        _require_documents(data, arguments.limit, ranks.world.size)
    found = _ask(arguments, ranks, tasks)
    if found is None:  # another rank reports
        return
    report = {
        name: {
            "setting": setting_name(num_fewshot_of(name, shots), arguments.fine_tuned),
            "prompt": data[name].prompt,
            "file": str(data[name].path),
            "documents": len(found[name]),
            "metrics": summarise(found[name]),
        }
        for name in names
    }
    finish(arguments, report, ranks.world.size)


def _require_lm_eval() -> None:
    # Before lm-eval and transformers are imported, which read them: nothing here is on the network.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        import accelerate  # noqa: F401  lm-eval needs it for models of transformers, and does not ask for it
        import lm_eval  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--tasks needs the package {error.name}, which is not installed; pip install -r requirements-eval.txt"
        ) from None


def _require_documents(data: dict[str, TaskData], limit: int | None, ranks: int) -> None:
    for name, read in data.items():
        if (count := min(len(read.documents), limit or len(read.documents))) < ranks:
            raise UserError(f"{name}: {count} documents are too few for {ranks} ranks; start fewer")


def _ask(arguments: argparse.Namespace, ranks: Ranks, tasks: dict[str, Any]) -> dict[str, list[dict]] | None:
    """What lm-eval noted of each document of each task, in the files' order; None on ranks but the first."""
    from lm_eval.evaluator import evaluate

    from tools.evaluation.harness import NativeLM, TransformersLM

    dtype, batch_size = getattr(torch, arguments.dtype), arguments.batch_size or 8
    with ranks.agreed():
        loaded = load_model_directory(arguments.model, device=arguments.device, dtype=dtype)
    if arguments.through == HUGGINGFACE:
        limit = loaded.config.context_limit
        del loaded  # was to be checked, by its sha256
        model = TransformersLM(arguments.model, ranks, batch_size=batch_size, dtype=dtype, limit=limit)
    else:
        model = NativeLM(loaded, ranks, batch_size=batch_size)
    found = evaluate(model, {"tasks": tasks, "groups": {}}, limit=arguments.limit, bootstrap_iters=0, log_samples=True)
    if found is None:
        return None
    return {name: sorted(found["samples"][name], key=lambda sample: sample["doc_id"]) for name in tasks}


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Value and standard error (None for one document) of each metric of a task, from what lm-eval noted of documents.

    acc, acc_norm: shares of right answers. perplexity: exp of the mean of -log p a document; word_perplexity,
    byte_perplexity: exp of the sum of -log p over the sum of words or bytes; bits_per_byte: its log2.
    """
    return {metric: _summary(metric, [sample[metric] for sample in samples]) for metric in samples[0]["metrics"]}


def _summary(metric: str, found: Sequence[Any]) -> dict[str, float | None]:
    number = len(found)
    values, weights = (found, [1.0] * number) if metric in _ALONE else zip(*found, strict=True)
    total = math.fsum(weights)
    mean = math.fsum(values) / total
    error = None
    if number > 1:
        # Of a ratio of sums; for weights of 1 the standard error of a mean.
        squares = math.fsum((value - mean * weight) ** 2 for value, weight in zip(values, weights, strict=True))
        error = math.sqrt(squares * number / (number - 1)) / total
    if metric.endswith("perplexity"):
        mean = math.inf if -mean >= 700 else math.exp(-mean)
        return {"value": mean, "stderr": None if error is None else mean * error}
    if metric == "bits_per_byte":
        return {"value": -mean / math.log(2), "stderr": None if error is None else error / math.log(2)}
    return {"value": mean, "stderr": error}


def paper_row(tasks: dict[str, Any], limit: int | None) -> dict[str, float | None]:
    """The paper's Table 1 by heading: accuracies in percent; Avg needs all eight.

    None for what was not measured, and for what is no such number: of prompts other than lm-eval's, or of the first
    `limit` documents.
    """
    tasks = {name: task for name, task in tasks.items() if limit is None and task["prompt"] == LIKE_LM_EVAL}
    row: dict[str, float | None] = {}
    for heading, task, metric in COLUMNS:
        value = tasks[task]["metrics"][metric]["value"] if task in tasks else None
        row[heading] = value if value is None or "ppl" in heading else 100 * value
    accuracies = [value for heading, value in row.items() if "ppl" not in heading]
    row["Avg"] = None if None in accuracies else math.fsum(accuracies) / len(accuracies)
    return row


def finish(arguments: argparse.Namespace, tasks: dict[str, Any], ranks: int) -> None:
    """Writes the results and prints the tables."""
    row = paper_row(tasks, arguments.limit)
    report = {
        "limit": arguments.limit,
        "through": arguments.through,
        "dtype": arguments.dtype,
        "ranks": ranks,
        "seed": arguments.seed,
        "versions": {name: metadata.version(name) for name in ("lm_eval", "torch", "transformers")},
        "tasks": tasks,
        "table": row,
    }
    scalars = {
        f"{name}/{metric} ({_label(task, arguments.limit)})": found["value"]
        for name, task in tasks.items()
        for metric, found in task["metrics"].items()
    }
    write_results(arguments, report)
    tensorboard_scalars(arguments, "downstream", scalars)
    _print(arguments, tasks, row)  # last: whoever reads it may have gone


def _label(task: dict[str, Any], limit: int | None) -> str:
    """How a task's numbers were made, as far as it keeps them from others."""
    prompt = [] if task["prompt"] == LIKE_LM_EVAL else [task["prompt"]]
    return ", ".join([task["setting"], *prompt, *([] if limit is None else [f"first {limit}"])])


def _print(arguments: argparse.Namespace, tasks: dict[str, Any], row: dict[str, float | None]) -> None:
    limit = arguments.limit
    console = Console(width=max(140, Console().width))
    title = None if limit is None else f"first {limit:,} documents of each task: not to be compared with published ones"
    every = Table("task", "setting", "prompt", "documents", "metric", "value", "stderr", title=title)
    for name, task in tasks.items():
        for metric, found in task["metrics"].items():
            error = "n/a" if found["stderr"] is None else f"{found['stderr']:.4g}"
            count = f"{task['documents']:,}"
            every.add_row(name, task["setting"], task["prompt"], count, metric, f"{found['value']:.4g}", error)
    console.print(every)
    if limit is not None:
        return
    settings = ", ".join(dict.fromkeys(task["setting"] for task in tasks.values()))
    paper = Table(*row, title=f"{arguments.model}: columns of the paper's Table 1 ({settings})")
    paper.add_row(*("" if value is None else f"{value:.4g}" for value in row.values()))
    console.print(paper)
