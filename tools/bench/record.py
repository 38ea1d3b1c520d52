"""The record of a benchmark: what was measured, on what, with which versions, by which command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RECORDS = Path(__file__).parent / "records"
_PACKAGES = ("torch", "triton", "deepspeed", "numpy")


def _git(*arguments: str) -> str | None:
    """Output of a git command in the project's folder; None outside a checkout or without git."""
    try:
        result = subprocess.run(["git", *arguments], cwd=RECORDS, capture_output=True, text=True, check=True)
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
    return facts


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide about speed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
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


def make_record(name: str, arguments: Sequence[str], settings: dict[str, Any], results: Any) -> dict[str, Any]:
    """The record as JSON-ready values; `arguments` are those after `python -m tools.bench`."""
    return {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m tools.bench", *arguments]),
        **environment(),
        "settings": settings,
        "results": results,
    }


def write_record(record: dict[str, Any], path: Path) -> None:
    """Writes the record as JSON and says where, on stderr."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {path}", file=sys.stderr)
