"""What a run wrote of itself, read without anything that trains: run.jsonl and the logs of its ranks."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

EVENTS_FILE = "run.jsonl"
LOGS_FOLDER = "logs"
CHECKPOINTS_FOLDER = "checkpoints"
_OF_CHECKPOINTS = ("save", "save_alarm", "save_failed", "upload", "upload_failed", "upload_alarm")


def events_size(folder: Path) -> int:
    """How many bytes of events a run has written so far."""
    path = folder / EVENTS_FILE
    return path.stat().st_size if path.exists() else 0


def read_events(folder: Path, start: int = 0) -> list[dict[str, Any]]:
    """A run's events from byte `start` of run.jsonl on; none where there is no such file. What a killed process left of
    a line is no event.
    """
    try:
        with open(folder / EVENTS_FILE, "rb") as file:
            file.seek(start)
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # cut within a character or a value
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def has_checkpoint_since(folder: Path, moment: datetime) -> bool:
    """Whether a run's folder holds a checkpoint that was written since: also one that a kill kept from its event."""
    try:
        return any(path.stat().st_mtime >= moment.timestamp() for path in (folder / CHECKPOINTS_FOLDER).glob("step-*"))
    except OSError:  # removed meanwhile, as newer ones are there, of which the events tell
        return False


@dataclass(frozen=True)
class Progress:
    """How far a run came in some of its events."""

    step: int | None
    """The last that it came to, as far as its events tell."""

    saved: bool
    """Whether a checkpoint was written."""

    error: str | None
    """The exception that ended it."""

    @classmethod
    def of(cls, events: list[dict[str, Any]]) -> "Progress":
        """Read from the events of an attempt."""
        # Saves and uploads are told behind later steps.
        steps = [event["step"] for event in events if "step" in event and event["event"] not in _OF_CHECKPOINTS]
        errors = [f"{e.get('type')}: {e.get('message')}" for e in events if e["event"] == "error"]
        return cls(
            step=steps[-1] if steps else None,
            saved=any(event["event"] == "save" for event in events),
            error=errors[-1] if errors else None,
        )
