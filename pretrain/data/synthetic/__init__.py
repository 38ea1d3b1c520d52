"""Rows that are drawn for a task with right answers: associative recall, pass-key, copying, state tracking.

A row is a pure function of (seed, split, sample): see `draws`. The tasks are in `tasks`, their division over ranks and
steps is the loader's, as for shards.
"""

from pretrain.data.synthetic.config import SyntheticConfig
from pretrain.data.synthetic.draws import Draws
from pretrain.data.synthetic.source import HeldOutDraws, SyntheticSource
from pretrain.data.synthetic.task import ASK, MARK, NUM_SPECIAL, PAD, Task
from pretrain.data.synthetic.tasks import Copy, Passkey, Permutations, Recall

__all__ = [
    "ASK",
    "MARK",
    "NUM_SPECIAL",
    "PAD",
    "Copy",
    "Draws",
    "HeldOutDraws",
    "Passkey",
    "Permutations",
    "Recall",
    "SyntheticConfig",
    "SyntheticSource",
    "Task",
]
