"""How a rank's process ends, told by its exit code: what a launcher does about it depends on it."""

from __future__ import annotations

EXIT_DONE = 0
"""All tokens of the recipe are trained on."""

EXIT_USER_ERROR = 2
"""Something that the user must change; the message says what. Starting again changes nothing."""

EXIT_MACHINE_ERROR = 74
"""A disk or file system is full or failed, and the message says where; to a launcher a crash which has nothing to do
with the training: starting again, a few times and behind a while, may mend it (EX_IOERR)."""

EXIT_PREEMPTED = 75
"""Stopped on request, with a checkpoint behind the last step, or an earlier one where that could not be written: start
it again (EX_TEMPFAIL)."""

EXIT_FENCED_OFF = 77
"""Another copy of the run has taken its folder over: this one must not be started again."""
