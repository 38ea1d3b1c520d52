"""The weights of an exported model: one safetensors file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from pretrain.exported import PREFIX, WEIGHTS, WEIGHTS_INDEX

MAX_SHARD_BYTES = 5_000_000_000
"""Default size above which weights are cut into several files."""


def write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes the parameters, each whole, in order, into as many files of at most `max_shard_bytes` as that takes.

    A parameter that is larger by itself has a file of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][PREFIX + name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / WEIGHTS, {"format": "pt"})
        return
    places: dict[str, str] = {}
    stem, suffix = WEIGHTS.split(".")
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        save_file(shard, folder / name, {"format": "pt"})
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": places}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
