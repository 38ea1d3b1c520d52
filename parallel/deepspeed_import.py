"""Importing DeepSpeed without its detours: its guess of the accelerator, compilers, warnings of no consequence."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from types import ModuleType
from typing import Any

import torch


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, for processes that compute on `device`."""
    # Saying which accelerator it is spares DeepSpeed its guess, and makes `device: cpu` hold on a machine with GPUs.
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed
    import deepspeed.ops

    # Building this shared-memory operator takes 20 to 60 s and a compiler; only tensor-parallel inference calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its Muon, which is not used here, is imported with every optimizer and asks for compiled functions as it is: that
    # imports torch's compiler, a quarter of the start of a run.
    compiler, torch.compile = torch.compile, _not_compiled
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compiler
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A skipped step is the caller's to tell.
    logging.getLogger("DeepSpeed").addFilter(_is_not_of_a_skipped_step)
    # ZeRO 3 warns of outputs that are no tuples: `LossModule` unpacks the model's, and no parameter is used
    # outside its own module.
    importlib.import_module("deepspeed.runtime.zero.utils").warned = True
    # torch >= 2.13 renames collectives that DeepSpeed 0.19 calls by their old names, once for each call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed


def _is_not_of_a_skipped_step(record: logging.LogRecord) -> bool:
    return "OVERFLOW" not in record.getMessage()


def _not_compiled(function: Any = None, **options: Any) -> Any:
    return function if function is not None else lambda given: given
