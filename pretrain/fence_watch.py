"""Looking at the fence between saves: an older copy of a run that is back from behind a cut network, or a long sleep,
must not write into the log that is the newer copy's.
"""

from __future__ import annotations

import contextlib
import time

from pretrain.fence import Fence, FencedOffError

SECONDS = 1.0
"""Between two looks at the file, at least."""


class FenceWatch:
    """Rank 0's look at the fence that this copy of the run took."""

    def __init__(self, fence: Fence) -> None:
        self._fence = fence
        self._looked = -SECONDS
        self._newer: FencedOffError | None = None

    def newer_copy(self) -> FencedOffError | None:
        """The error that says which other copy has taken the folder over; None where none has, up to a second ago."""
        if self._newer is None and time.monotonic() - self._looked >= SECONDS:
            with contextlib.suppress(OSError):  # a save, which needs the file, fails for it and says so
                try:
                    self._fence.check()
                except FencedOffError as newer:
                    self._newer = newer
            self._looked = time.monotonic()
        return self._newer
