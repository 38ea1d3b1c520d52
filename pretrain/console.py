"""Output that outlives a full disk: what is printed goes to a log, often on the disk that checkpoints fill, and a line
that finds no room there is no reason to end a run.
"""

from __future__ import annotations

import errno
import sys
from typing import Any, TextIO

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""The numbers of the errors of a disk that is full."""
_NOTE = "\n(lines are missing here: there was no space left on the disk of this log)\n"


class OutlivingStream:
    """A stream of text that drops what finds no room, and says so once when there is some again. Any other error, as of
    a pipe whose reader is gone, is raised.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_full = self._owes_note = False

    def write(self, text: str) -> int:
        """As TextIO's."""
        try:
            if self._is_full:
                self._go_on()
            return self._stream.write(text)
        except OSError as error:
            self._note(error)
        return len(text)

    def flush(self) -> None:
        """As TextIO's."""
        try:
            self._stream.flush()
        except OSError as error:
            self._note(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _go_on(self) -> None:
        self._stream.flush()
        if self._owes_note:
            self._stream.write(_NOTE)
            self._owes_note = False
            self._stream.flush()
        self._is_full = False

    def _note(self, error: OSError) -> None:
        if error.errno not in NO_ROOM:
            raise error
        if not self._is_full:
            self._is_full = self._owes_note = True


def outlive_full_disks() -> None:
    """From now on this process's output is an OutlivingStream's."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), OutlivingStream):
            setattr(sys, name, OutlivingStream(getattr(sys, name)))
