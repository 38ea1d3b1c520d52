"""Threads beside the steps give way to them."""

from __future__ import annotations

import os
import sys
import threading

NICER = 5
"""How much such a thread gives way to those that compute: where they want all cores, it gets a quarter of one. Where it
gets much less (a thirtieth at 15), steps wait for the interpreter's lock while the one who holds it waits for a core:
measured beside steps on two cores, saves added twice as much at 15.
"""


def give_way() -> None:
    """Lower the priority of the thread that calls it."""
    if sys.platform == "linux":  # elsewhere it would be the whole process's
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICER))
