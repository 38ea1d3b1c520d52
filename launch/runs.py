"""The runs that a person may mean: by folder or by name."""

from collections.abc import Sequence
from pathlib import Path

from launch.attempts import ATTEMPTS_FILE, LAUNCH_FOLDER
from launch.jobs import JOB_FILE, SubmittedJob
from launch.run_events import EVENTS_FILE
from pretrain.errors import UserError

RUNS = Path("runs")
"""Where names are looked for: recipes write below it."""
_DEPTH = 3


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run that was launched, or has begun."""
    marks = (EVENTS_FILE, f"{LAUNCH_FOLDER}/{ATTEMPTS_FILE}", f"{LAUNCH_FOLDER}/{JOB_FILE}")
    return any((folder / mark).is_file() for mark in marks)


def known_runs() -> list[Path]:
    """The folders of runs below `RUNS`, sorted; what stands in a run's folder is no other run."""
    found: list[Path] = []
    level = [RUNS] if RUNS.is_dir() else []
    for _ in range(_DEPTH):
        below = [path for folder in level for path in folder.iterdir() if path.is_dir()]
        found += [path for path in below if is_run(path)]
        level = [path for path in below if not is_run(path)]
    return sorted(found)


def find_run(word: str) -> Path:
    """The folder of a run that is given as a folder, or by the name of its folder or job. Raises UserError."""
    if is_run(Path(word)):
        return Path(word)
    known = known_runs()
    jobs = {path: job.name for path in known if (job := SubmittedJob.read(path)) is not None}
    found = [path for path in known if word in (path.name, jobs.get(path))]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{word}: {len(found)} runs are called so; give a folder: {', '.join(map(str, found))}")
    names = ", ".join(str(path) for path in known[:20]) or "none"
    raise UserError(f"{word}: no run's folder, and no run's name below {RUNS}/ (those there: {names})")


def find_runs(words: Sequence[str]) -> list[Path]:
    """The runs that are named, or all below `RUNS`. Raises UserError where there is none."""
    found = [find_run(word) for word in words] if words else known_runs()
    if not found:
        raise UserError(f"no run below {RUNS}/; give a run's folder")
    return found
