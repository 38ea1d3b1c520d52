"""`python -m tools.bench.worker FD`: measures the cases on its standard input, a line of JSON for each into FD."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import sys
from typing import Any

import torch

from tools.bench.cases import FAILED, NOT_SUPPORTED, OUT_OF_MEMORY


def main() -> None:
    """Reads {"function", "cases", "settings"}; an error ends the process, but for a lack of memory and for
    what a backend says it cannot do.
    """
    results = int(sys.argv[1])
    work = json.load(sys.stdin)
    module, name = work["function"].split(":")
    function = getattr(importlib.import_module(module), name)
    for case in work["cases"]:
        os.write(results, (json.dumps(_measured(function, {**case, **work["settings"]})) + "\n").encode())
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    # Process groups and CUDA may abort in their destructors, when there is nothing left to lose.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _Warnings(logging.Handler):
    """What `kernels` warned of: that a backend failed its self-test, and another computes in its place."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


# What a backend's self-test does not depend on; it is asked for once in a process.
_FREE = ("length", "batch", "repeats", "threads")
_OFF: dict[tuple[tuple[str, Any], ...], str] = {}


def _measured(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    warnings = _Warnings()
    logging.getLogger("kernels").addHandler(warnings)
    try:
        result = _result(function, arguments)
    finally:
        logging.getLogger("kernels").removeHandler(warnings)
    if "backend" not in arguments:
        return result
    # Another backend's numbers must not stand under the name of the one that was asked for.
    problem = tuple((name, value) for name, value in sorted(arguments.items()) if name not in _FREE)
    if warnings.messages:
        _OFF[problem] = "; ".join(warnings.messages)
    return {"outcome": FAILED, "why": _OFF[problem]} if problem in _OFF else result


def _result(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return function(**arguments)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"outcome": OUT_OF_MEMORY, "why": next(iter(str(error).splitlines()), type(error).__name__)}
    except (NotImplementedError, ValueError) as error:
        if "backend" not in str(error):
            raise
        return {"outcome": NOT_SUPPORTED, "why": str(error)}


if __name__ == "__main__":
    main()
