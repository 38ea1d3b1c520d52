"""`python -m launch status`: where runs stand, from what they wrote and what Slurm says. Needs no torch."""

import argparse
import json
import re
import shutil
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.attempts import Attempt, Ledger
from launch.jobs import SubmittedJob, process_start, queue_state
from launch.run_events import EVENTS_FILE
from launch.runs import find_runs

_KIND = re.compile(rb'\{"event": "(\w+)"')


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "status", help="where runs stand", description="Where runs stand.", allow_abbrev=False
    )
    parser.add_argument("runs", nargs="*", metavar="FOLDER|NAME", help="runs (default: all below runs/)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the status of each run; returns 0. Raises UserError for a run that is not there."""
    for number, folder in enumerate(find_runs(options.runs)):
        status = status_of(folder)
        if options.json:
            print(json.dumps(asdict(status)))
        else:
            print(("\n" if number else "") + status.text())
    return 0


@dataclass(frozen=True)
class Status:
    """Where a run stands. None: not known, or there is none."""

    folder: str
    name: str | None
    state: str
    """done, running (also while its launch waits to start it again), running on another host, pending, stopped, failed,
    lost (nobody saw its end), not started, or unknown (of a job, where squeue cannot be asked)."""

    job: str | None
    """A Slurm job's number, or the name of a launch of one machine (see Attempt.job)."""
    job_state: str | None
    """As squeue says it."""
    step: int | None
    steps: int | None
    """Where the run ends."""
    tokens: int | None
    total_tokens: int | None
    loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    """A share of the devices' peak."""
    seconds_left: float | None
    restarts: int
    """How often it went on from where an earlier attempt ended, or began anew."""
    checkpoint: str | None
    """The last one that was written."""
    last_error: str | None
    updated: str | None
    """When the run last wrote an event: ISO 8601, UTC."""

    def text(self) -> str:
        """For people."""
        lines = [f"{self.folder}: {self.state}" + (f" (job {self.job}{_after(self.job_state)})" if self.job else "")]
        if self.step is not None:
            done = f"{self.tokens or 0:,} of {self.total_tokens:,} tokens" if self.total_tokens else "?"
            share = f" ({100 * (self.tokens or 0) / self.total_tokens:.1f} %)" if self.total_tokens else ""
            lines.append(f"  step {self.step} of {self.steps}, {done}{share}{_loss(self.loss)}")
        if self.tokens_per_second is not None:
            mfu = "n/a" if self.mfu is None else f"{100 * self.mfu:.1f} %"
            left = "" if self.seconds_left is None else f", {_duration(self.seconds_left)} left"
            lines.append(f"  {self.tokens_per_second:,.0f} tokens/s, MFU {mfu}{left}")
        lines.append(f"  restarts: {self.restarts}; last checkpoint: {self.checkpoint or 'none'}")
        if self.last_error is not None:
            lines.append(f"  last error: {self.last_error}")
        if self.updated is not None:
            lines.append(f"  last event: {self.updated}")
        return "\n".join(lines)


def _after(word: str | None) -> str:
    return "" if word is None else f", {word}"


def _loss(loss: float | None) -> str:
    return "" if loss is None else f", loss {loss:.4f}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {whole % 60:02d}s"


def status_of(folder: Path) -> Status:
    """A run's status. Raises OSError where its files cannot be read."""
    last, counts = last_events(folder)
    attempts, submitted = Ledger(folder).read(), SubmittedJob.read(folder)
    began = max((last[kind] for kind in ("start", "resume") if kind in last), key=_time, default={})
    stands = max((event for event in last.values() if "tokens" in event), key=_time, default={})
    step, total = last.get("step", {}), total_tokens(began.get("recipe", {}))
    job = submitted.job if submitted else None
    if attempts and (submitted is None or attempts[-1].started > submitted.submitted):
        job = newest_attempt(attempts).job
    job_state = queue_state(job) if job is not None and job.isdigit() else None
    state = state_of(last, attempts, job, job_state)
    speed = step.get("tokens_per_second") if state == "running" or state == "done" else None
    left = None
    if speed and total is not None:
        left = max(total - stands.get("tokens", 0), 0) / speed
    save = max(
        (last[kind] for kind in ("save", "preempt") if last.get(kind, {}).get("checkpoint")), key=_time, default={}
    )
    newest = max(last.values(), key=_time, default={})
    return Status(
        folder=str(folder),
        name=began.get("recipe", {}).get("name") or (submitted.name if submitted else None),
        state=state,
        job=job,
        job_state=job_state,
        step=stands.get("step"),
        steps=began.get("steps"),
        tokens=stands.get("tokens"),
        total_tokens=total,
        loss=step.get("loss"),
        tokens_per_second=speed,
        mfu=step.get("mfu"),
        seconds_left=left,
        restarts=max(counts.get("start", 0) + counts.get("resume", 0) - 1, 0),
        checkpoint=save.get("checkpoint"),
        last_error=last_error(last, attempts),
        updated=newest.get("time"),
    )


def last_events(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """The last event of each kind, and how many there are of each. Only these are parsed: runs have many steps."""
    lines: dict[str, bytes] = {}
    counts: dict[str, int] = {}
    path = folder / EVENTS_FILE
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                match = _KIND.match(line)
                if match and line.endswith(b"}\n"):  # what a killed process left of a line is no event
                    kind = match[1].decode()
                    lines[kind], counts[kind] = line, counts.get(kind, 0) + 1
    return {kind: json.loads(line) for kind, line in lines.items()}, counts


def total_tokens(recipe: dict[str, Any]) -> int | None:
    """What a run's phases train on together, of a recipe as start and resume events have it."""
    if not recipe:
        return None
    every = recipe["training"]["tokens"]
    return sum(phase.get("training", {}).get("tokens", every) for phase in recipe.get("phases", [{}]))


def state_of(last: dict[str, Any], attempts: list[Attempt], job: str | None, job_state: str | None) -> str:
    """The run's state in a word (see Status)."""
    if job_state is not None:
        return {"PENDING": "pending", "REQUEUED": "pending", "UNKNOWN": "unknown"}.get(job_state, "running")
    if not attempts:
        return "done" if "done" in last else "not started" if not last else "unknown"
    newest = newest_attempt(attempts)
    if (pid := local_process(newest)) is not None:
        return "running" if pid else "running on another host"
    if newest.ended is not None:
        return {0: "done", 75: "stopped"}.get(-1 if newest.exit_code is None else newest.exit_code, "failed")
    return "unknown" if newest.job.isdigit() and shutil.which("squeue") is None else "lost"


def newest_attempt(attempts: list[Attempt]) -> Attempt:
    """The one that runs on this host, if one does: behind it there may be launches that were refused for it. Else the
    last one.
    """
    return next((found for found in reversed(attempts) if local_process(found)), attempts[-1])


def local_process(attempt: Attempt) -> int | None:
    """The process number of the launcher, on this host, of an attempt that runs or is to be followed by another; 0
    where it is on another host; None where it has ended, or is a Slurm job.
    """
    match = re.fullmatch(r"local-(.*)-(\d+)-(\d+)", attempt.job)
    if match is None or (attempt.ended is not None and not attempt.again):
        return None
    if match[1] != socket.gethostname():
        return 0
    return int(match[2]) if process_start(int(match[2])) == int(match[3]) else None


def last_error(last: dict[str, Any], attempts: list[Attempt]) -> str | None:
    """The newest of what a rank wrote before it ended, and of what the launcher saw."""
    found = []
    if "error" in last:
        event = last["error"]
        found.append((_time(event), f"{event.get('type')}: {event.get('message')}"))
    for attempt in attempts:
        if attempt.ended is not None and attempt.failure is not None:
            found.append((datetime.fromisoformat(attempt.ended), attempt.failure))
    return max(found)[1] if found else None


def _time(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["time"]) if "time" in event else datetime.fromtimestamp(0, UTC)
