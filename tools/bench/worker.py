"""`python -m tools.bench.worker FD`: measures the cases on its standard input, a line of JSON for each into FD."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from typing import Any

import torch

from tools.bench.cases import NOT_SUPPORTED, OUT_OF_MEMORY


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


def _measured(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
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
