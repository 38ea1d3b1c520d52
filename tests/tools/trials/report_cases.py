"""Made-up results of a suite with everything that a report must show: several studies and seeds, a run that diverged, a
run that is missing, and loss by position.
"""

from __future__ import annotations

import math
import random
from typing import Any

from tools.trials.record import Record, StudyRecord
from tools.trials.results import Result

ENVIRONMENT = {
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "hardware": {"machine": "x86_64", "cores": 2, "memory_bytes": 25276514304, "processor": "Test <CPU>"},
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
}
VARIANTS = ("lmm", "mac", "mag", "mal", "transformer")
STUDIES = {
    "variants": StudyRecord(
        title="Recall at <sixteen> windows & beyond",
        metric="accuracy",
        sequence_length=96,
        trials=VARIANTS,
        seeds=(0, 1, 2),
        probes=("as trained", "16 windows"),
    ),
    "ablations": StudyRecord(
        title="What each part of the memory is worth",
        metric="accuracy",
        sequence_length=96,
        trials=("everything", *(f"without-part-{index:02d}" for index in range(15))),
        seeds=(0, 1),
        probes=("as trained", "4 windows", "16 windows", "twice the pairs, and twice the questions to them"),
    ),
    "text": StudyRecord(
        title="Text longer than any that training saw",
        metric="loss",
        sequence_length=256,
        trials=("lmm", "mac", "transformer"),
        seeds=(0, 1),
        probes=("as trained", "4 times as long", "16 times as long"),
    ),
}


def result(study: str, trial: str, seed: int, **fields: Any) -> Result:
    """A result with these fields over those of a short finished run."""
    return Result.model_validate(
        {
            "study": study,
            "trial": trial,
            "seed": seed,
            "recipe_sha256": "0" * 64,
            "parameters": 123_456,
            "tokens": 1_612_800,
            "steps": 900,
            "seconds": 88.1,
            "tokens_per_second": 18300.0,
            "threads": 1,
            "chance": 1 / 32,
            "curve": [],
            "memory": {},
            "probes": {},
            "environment": ENVIRONMENT,
            **fields,
        }
    )


def recall(study: str, trial: str, seed: int, best: float, probes: tuple[str, ...]) -> Result:
    """A run that learned to answer up to a share `best` of the questions."""
    noise = random.Random(f"{study}/{trial}/{seed}")
    curve = [
        [step, 0.03 + (best - 0.03) / (1 + math.exp(-(step - 450 - 80 * noise.random()) / 90))]
        for step in range(100, 1000, 100)
    ]
    found = {
        name: {
            "accuracy": max(0.0, best * 0.8**index - 0.05 * noise.random()),
            "loss": 0.1 + noise.random(),
            "tokens": 1024,
            "row_tokens": 96 * 2**index,
        }
        for index, name in enumerate(probes)
    }
    return result(study, trial, seed, curve=curve, probes=found, parameters=120_000 + len(trial) * 321)


def text(study: str, trial: str, seed: int, gain: float) -> Result:
    """A run on text whose loss falls by `gain` with each doubling of the position."""
    noise = random.Random(f"{study}/{trial}/{seed}")
    base = 4.6 + 0.05 * noise.random()
    probes = {}
    for name, context in {"as trained": 256, "4 times as long": 1024, "16 times as long": 4096}.items():
        buckets, first, last = [], 0, 63
        while first < context:
            loss = base - gain * math.log2((first + last) / 64)
            buckets.append({"first": first, "last": last, "tokens": 4096, "loss": loss})
            first, last = last + 1, 2 * last + 1
        mean = sum(bucket["loss"] for bucket in buckets) / len(buckets)
        probes[name] = {"loss": mean, "bits_per_byte": mean / 2, "tokens": 65536, "row_tokens": context}
        probes[name]["by_position"] = buckets
    curve = [[step, base + 2.5 * math.exp(-step / 200)] for step in range(50, 1000, 50)]
    memory = {f"layer {layer}": {"alpha": 0.01, "eta": 0.9 + 0.05 * seed} for layer in (0, 2)}
    memory = {} if trial == "transformer" else memory
    return result(study, trial, seed, chance=None, curve=curve, probes=probes, memory=memory)


def full_record() -> Record:
    """All studies, with a diverged and two missing runs of `variants`, and an ablation that always diverges."""
    results = [
        recall("variants", trial, seed, 0.98 - 0.2 * index, STUDIES["variants"].probes)
        for index, trial in enumerate(VARIANTS)
        for seed in (0, 1, 2)
        if (trial, seed) not in {("mal", 1), ("mal", 2), ("transformer", 2)}
    ]
    results.append(
        result(
            *("variants", "mal", 1),
            curve=[[100, 0.05], [200, 0.1]],
            failed="FloatingPointError: loss is nan at step 204 <layer 1>",
            steps=204,
            tokens=365_568,
        )
    )
    results += [
        recall("ablations", trial, seed, 0.95 - 0.05 * index, STUDIES["ablations"].probes)
        for index, trial in enumerate(STUDIES["ablations"].trials[:-1])
        for seed in (0, 1)
    ]
    results += [
        result("ablations", "without-part-14", seed, failed="FloatingPointError: loss is nan at step 7")
        for seed in (0, 1)
    ]
    results += [
        text("text", trial, seed, gain)
        for trial, gain in {"lmm": 0.05, "mac": 0.08, "transformer": -0.02}.items()
        for seed in (0, 1)
    ]
    return Record(
        command="python -m tools.trials run",
        seconds=5400.0,
        studies=STUDIES,
        results=tuple(results),
    )
