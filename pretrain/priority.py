"""Threads beside the steps give way to them."""

from __future__ import annotations

import os
import sys
import threading

NICER = 15
"""How much such a thread gives way to those that compute: where they want all cores, it gets a thirtieth of one, so
that it slows no step by more, and is done all the same.
"""


def give_way() -> None:
    """Lower the priority of the thread that calls it."""
    if sys.platform == "linux":  # elsewhere it would be the whole process's
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICER))
