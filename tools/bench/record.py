"""The record of a benchmark: what was measured, on what, with which versions, by which command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import UserError
from tools.trials.results import replace_text

RECORDS = Path(__file__).parent / "records"
RIVAL = "titans-pytorch"
"""The best-known public implementation, an optional dependency of the benchmarks."""
_PACKAGES = ("torch", "triton", "deepspeed", "numpy")
_FIELDS = ("name", "date", "command", "commit", "hardware", "versions", "settings", "results")


def _git(*arguments: str) -> str | None:
    """Output of a git command in the project's folder; None outside a checkout or without git."""
    try:
        result = subprocess.run(["git", *arguments], cwd=RECORDS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def hardware() -> dict[str, Any]:
    """Processor, cores and memory, and the GPU if there is one."""
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        facts["processor"] = names[0] if names else platform.processor()
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return facts


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Python's version and those of the packages that decide about speed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment() -> dict[str, Any]:
    """Commit, hardware and versions, as JSON-ready values."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(changed),
        "hardware": hardware(),
        "versions": versions(),
    }


def make_record(
    name: str, arguments: Sequence[str], settings: dict[str, Any], results: Any, *, commit: str | None = None
) -> dict[str, Any]:
    """The record as JSON-ready values.

    Args:
        name: which kind of measurement: it decides about table and plot.
        arguments: those after `python -m tools.bench`.
        commit: of the code, for where it does not lie in a git checkout.
    """
    found = {**environment(), "versions": versions((*_PACKAGES, RIVAL))}
    if found["commit"] is None:  # then nothing is known of changes either
        found |= {"commit": commit, "uncommitted_changes": None}
    return {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "tools.bench", *arguments]),
        **found,
        "settings": settings,
        "results": results,
    }


def write_record(record: dict[str, Any], path: Path) -> None:
    """Writes the record as JSON, whole or not at all. Raises UserError where it cannot be written."""
    replace_text(path, json.dumps(record, indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """A record that `write_record` wrote. Raises UserError for a file that is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: is no record of a benchmark: {error}; remove it, or measure again") from error
    lacking = [field for field in _FIELDS if field not in record] if isinstance(record, dict) else list(_FIELDS)
    if lacking:
        raise UserError(
            f"{path}: is no record of a benchmark: it lacks {', '.join(lacking)}; remove it, or measure again"
        )
    return record


def device_slug(record: dict[str, Any]) -> str:
    """What a record was measured on, for names of files: `cpu`, `nvidia-h100-80gb-hbm3`."""
    if record["settings"].get("device") != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", record["hardware"].get("gpu", "cuda").lower()).strip("-")
