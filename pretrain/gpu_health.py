"""Whether a GPU computes what it should: products whose result is known exactly, and errors that its memory counted."""

from __future__ import annotations

import shutil
import subprocess

import torch

_SIZE, _INNER = 2048, 64
_SECONDS_FOR_QUESTION = 10.0


def wrong_products(device: torch.device) -> str | None:
    """What is wrong with matrix products and memory of a device; None where nothing is.

    Of integers from -2 to 2, 64 to a sum: whatever the order, bf16 holds each part of it exactly, so that every number
    must be right.
    """
    along, inner = torch.arange(_SIZE)[:, None], torch.arange(_INNER)[None, :]
    left, right = (along * 7 + inner * 3) % 5 - 2, ((along * 3 + inner * inner) % 5 - 2).T
    # Row i of the left hangs on i mod 5 alone, and column j of the right on j mod 5: there are 25 sums.
    expected = (left[:5] @ right[:, :5]).repeat(_SIZE // 5 + 1, _SIZE // 5 + 1)[:_SIZE, :_SIZE].float()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            product = left.to(device, dtype) @ right.to(device, dtype)
            wrong = int((product.float().cpu() != expected).sum())
            if wrong:
                return f"{wrong} of {_SIZE * _SIZE} numbers of a matrix product in {dtype} are wrong"
    except RuntimeError as error:  # out of memory, and all that CUDA reports
        return f"a matrix product fails: {error}"
    return None


def memory_errors(device: torch.device) -> int | None:
    """Errors of the GPU's memory since the driver was loaded that could not be corrected; None where nobody knows: no
    nvidia-smi, or a GPU that does not count them.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    question = [tool, "--query-gpu=ecc.errors.uncorrected.volatile.total", "--format=csv,noheader", f"--id={uuid}"]
    try:
        answer = subprocess.run(question, capture_output=True, text=True, timeout=_SECONDS_FOR_QUESTION, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    count = answer.stdout.strip()
    return int(count) if count.isdigit() else None
