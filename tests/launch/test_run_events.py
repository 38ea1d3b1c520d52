"""What is read from the events of a run."""

from __future__ import annotations

import pytest

from launch.run_events import Progress


@pytest.mark.parametrize("kind", ["save", "save_alarm", "save_failed", "upload", "upload_failed", "upload_alarm"])
def test_what_is_told_of_checkpoints_behind_later_steps_does_not_move_a_run_back(kind: str) -> None:
    found = Progress.of([{"event": "step", "step": 12}, {"event": kind, "step": 10}])
    assert found.step == 12 and found.saved == (kind == "save")
