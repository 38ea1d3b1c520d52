"""The runs whose losses are kept in tests/golden/losses.json, and the comparison with what a run gives today.

After a change that is meant to move the losses, write the file anew and commit it with the change:

    python -m tests.golden_cases
"""

from __future__ import annotations

import json
import platform
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.distributed_helper import run_ranks
from tests.training_cases import losses

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
STEPS = 50
ROW_TOKENS, ROWS = 32, 4
VARIANTS = ("mac", "mag", "mal", "lmm", "transformer")
RELATIVE_TOLERANCE = 1e-4
"""Between machines or versions, whose sums are rounded in other orders."""
PACKAGES = ("torch", "numpy", "deepspeed")


def environment() -> dict[str, str]:
    """All that the last bit of a loss may depend on beside the code: platform, processor, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().split("\n\n")[0] if cpuinfo.exists() else ""
    kind = re.findall(r"^((?:model name|cpu family|model|CPU part)\s*:.*)$", first, re.MULTILINE)
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": ", ".join(re.sub(r"\s*:\s*", " ", line) for line in kind) or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def golden_recipe(variant: str, folder: Path, steps: int = STEPS, **model: Any) -> dict[str, Any]:
    """A small model of a variant that learns to recall, with accumulation, decay, clipping and a warm-up; the schedule
    is such that fewer steps are the first ones of more. `model`: fields to change.
    """
    fields: dict[str, Any] = {
        "preset": f"{variant}-tiny",
        "vocab_size": 48,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 48,
    }
    if variant != "transformer":
        fields["memory"] = {"chunk": 8}
    if variant == "mac":
        fields["segment"] = 16
    if variant in ("mag", "mal", "transformer"):
        fields["window"] = 12
    if variant in ("mac", "mag", "mal"):
        fields["num_persistent"] = 2
    memory = {**fields.get("memory", {}), **model.pop("memory", {})}
    fields |= model | ({"memory": memory} if memory else {})
    batch = ROWS * ROW_TOKENS
    task = {"kind": "recall", "num_pairs": 4, "num_queries": 4, "filler": [8, 16]}
    return {
        "name": variant,
        "folder": str(folder),
        "model": fields,
        "data": {"kind": "synthetic", "task": {**task, "num_keys": 16, "num_values": 16, "num_filler": 8}},
        "training": {
            "tokens": steps * batch,
            "sequence_length": ROW_TOKENS,
            "batch_tokens": batch,
            "micro_batch_size": ROWS // 2,
        },
        "optimizer": {"lr": 2e-3},
        "schedule": {"kind": "constant", "warmup_tokens": 5 * batch},
        "parallel": {"zero_stage": 1, "precision": "fp32", "device": "cpu"},
        "evaluation": {"tokens": batch},
        "logging": {"every_steps": 1},
    }


def run(recipes: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, list[float]]:
    """The losses of each step of the named recipes, all trained in one process of one thread."""
    paths = {name: folder / f"{name}.yaml" for name in recipes}
    for name, path in paths.items():
        path.write_text(yaml.safe_dump(dict(recipes[name])))
    run_ranks(["tests/pretrain/train_worker.py", *map(str, paths.values())], ranks=1, timeout=300)
    seen = {name: losses(Path(recipe["folder"])) for name, recipe in recipes.items()}
    return {name: [steps[step] for step in sorted(steps)] for name, steps in seen.items()}


def differences(expected: Sequence[float], found: Sequence[float], *, exactly: bool) -> list[str]:
    """The steps whose losses differ: in any bit, or by more than the tolerance."""
    if len(expected) != len(found):
        return [f"{len(found)} steps, {len(expected)} are recorded"]
    tolerance = 0.0 if exactly else RELATIVE_TOLERANCE
    return [
        f"step {step}: {now!r}, recorded {then!r}"
        for step, (then, now) in enumerate(zip(expected, found, strict=True), start=1)
        if not abs(now - then) <= tolerance * abs(then)  # true for NaN as well
    ]


def main() -> int:
    """Write the golden file anew."""
    with tempfile.TemporaryDirectory() as folder:
        seen = run({variant: golden_recipe(variant, Path(folder) / variant) for variant in VARIANTS}, Path(folder))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({"environment": environment(), "losses": seen}, indent=1) + "\n")
    print(f"{GOLDEN}: {len(seen)} variants, {STEPS} steps each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
