"""Runs on every rank: `rot_worker.py FOLDER OUTPUT` alters a byte of each file of the newest checkpoint in FOLDER in
turn, and leaves in OUTPUT-RANK.json which checkpoint this rank would go on from then, and what it was told.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch

from parallel.process import barrier, exit_now, initialize, shutdown
from pretrain.checkpoints import Checkpoints, list_checkpoints


def main(folder: Path, output: str) -> None:
    torch.set_num_threads(1)
    world = initialize("cpu")
    checkpoints = Checkpoints(folder, 9, world)
    newest, found = list_checkpoints(folder)[0], dict[str, dict[str, object]]()
    for path in sorted(path for path in newest.iterdir() if path.stat().st_size):
        content = path.read_bytes()
        at = random.Random(path.name).randrange(len(content))
        barrier()
        if world.is_main:
            path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        barrier()
        said: list[str] = []
        chosen = checkpoints.newest_whole(said.append)
        found[path.name] = {"chosen": None if chosen is None else chosen.name, "said": said}
        barrier()
        if world.is_main:
            newest.with_name(f"damaged-{newest.name}").rename(newest)
            path.write_bytes(content)
        barrier()
    Path(f"{output}-{world.rank}.json").write_text(json.dumps(found))
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
