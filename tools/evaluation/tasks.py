"""The downstream tasks as lm-eval runs them, on local files: requests, metrics and few-shot examples."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results as wikitext_results
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

from pretrain.errors import UserError
from tools.evaluation.benchmark_files import TASKS, Record, TaskData

_MEAN = {"aggregation": "mean", "higher_is_better": True}
_ACC, _ACC_NORM = {"metric": "acc", **_MEAN}, {"metric": "acc_norm", **_MEAN}
_CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": lambda document: document["query"],
    "doc_to_choice": lambda document: document["choices"],
    "doc_to_target": lambda document: document["gold"],
    "metric_list": [_ACC, _ACC_NORM],
}
_CONTEXTS = {
    "output_type": "multiple_choice",
    # lm-eval's way to say that the choices are contexts of one continuation (Trinh and Le, arXiv 1806.02847).
    "doc_to_text": lambda document: document["gold"],
    "doc_to_choice": lambda document: document["contexts"],
    "doc_to_target": lambda document: document["continuation"],
    "metric_list": [_ACC],
}
_LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": lambda document: document["context"],
    "doc_to_target": lambda document: document["continuation"],
    "target_delimiter": "",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, _ACC],
}
_ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": lambda document: "",
    "doc_to_target": wikitext_detokenizer,
    "process_results": wikitext_results,
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}
_KINDS = dict.fromkeys(TASKS, _CHOICES) | {"winogrande": _CONTEXTS, "lambada": _LAST_WORD, "wikitext": _ROLLING}


def num_fewshot_of(name: str, num_fewshot: int) -> int:
    """Examples before each question: none where a whole text is scored."""
    return 0 if _KINDS[name] is _ROLLING else num_fewshot


def build_task(name: str, data: TaskData, *, num_fewshot: int, seed: int) -> ConfigurableTask:
    """The lm-eval task of a file's documents.

    Args:
        num_fewshot: examples with their answers before each question, drawn for each document by itself, so that the
            numbers do not depend on the number of ranks; from the training part, or from the other documents.

    Raises:
        UserError: there are too few examples.
    """
    shots = num_fewshot_of(name, num_fewshot)
    examples = data.examples if data.examples is not None else data.documents
    if shots and len(examples) <= shots:
        raise UserError(f"{data.path}: {len(examples)} examples are too few for --num-fewshot {shots}")
    # lm-eval warns that arguments may be passed to data that is made by a function.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(data.documents)},
            "test_split": "test",
            "num_fewshot": shots,
            "fewshot_config": {"sampler": _sampler(examples, seed), "split": "test"},
            **_KINDS[name],
        }
    )


def _sampler(examples: list[Record], seed: int) -> type[ContextSampler]:
    """lm-eval's sampler goes on from one document to the next, whose examples then depend on what a rank has read."""

    class SampledByDocument(ContextSampler):
        def sample(self, n: int, eval_doc: Record | None = None, *_: Any, **__: Any) -> Sequence[Record]:
            draw = random.Random(json.dumps([seed, eval_doc], sort_keys=True))
            drawn = draw.sample(examples, min(n + 1, len(examples)))
            others = [example for example in drawn if example != eval_doc]
            if len(others) < n:  # copies of the document were drawn
                others = draw.sample([example for example in examples if example != eval_doc], n)
            return others[:n]

    return SampledByDocument
