"""What is written down ahead of an attempt: a disk may get room, a path that is wrong stays so."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from launch.room import written_before
from pretrain.errors import MachineError, UserError


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR, errno.EROFS])
def test_a_path_that_cannot_be_written_is_told_at_once(number: int, tmp_path: Path) -> None:
    calls, said = [], []

    def begin() -> None:
        calls.append(1)
        raise OSError(number, os.strerror(number), str(tmp_path))

    with pytest.raises(UserError, match=os.strerror(number)) as told:
        written_before(begin, tmp_path, tries=3, say=said.append)
    assert not isinstance(told.value, MachineError) and len(calls) == 1 and said == []
