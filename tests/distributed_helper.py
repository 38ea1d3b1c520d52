"""Several ranks in a test: real processes with the launcher's environment, a time limit, and every rank's log when
one fails.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.forked_ranks import ROOT, ForkedRank, rank_server


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Finished:
    """What the ranks left: exit codes (negative: ended by that signal), output and error streams, by rank;
    `seconds` it took.
    """

    codes: list[int]
    outputs: list[str]
    errors: list[str]
    seconds: float

    def report(self) -> str:
        """All ranks' codes and logs, for an assertion's message."""
        parts = [
            f"--- rank {r}: exit {c}\n{o}\n{e}"
            for r, (c, o, e) in enumerate(zip(self.codes, self.outputs, self.errors, strict=True))
        ]
        return "\n".join(parts)


def run_ranks(
    arguments: Sequence[str],
    *,
    ranks: int,
    timeout: float = 600.0,
    kill_when: Callable[[], bool] | None = None,
    check: bool = True,
    threads: int = 1,
    fresh: bool = False,
) -> Finished:
    """Run `python <arguments>` once for each rank and wait for all.

    The processes are forked with the imports done (see `rank_server`), unless they are to be `fresh` ones or have
    several threads.

    With ranks=1 no launcher's variable is set: the path of a process that nobody launched. When a rank fails, the
    others are killed after 10 s, as a launcher would. `kill_when` is polled, and all ranks are ended by SIGKILL
    once it is true.

    Raises AssertionError with every rank's log when a rank fails (unless check=False) or the time is over.
    """
    port = free_port()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        start = _start if fresh or threads > 1 else _fork
        environments = [_environment(rank, ranks, port, threads) for rank in range(ranks)]
        processes = [start(arguments, each, Path(folder) / str(r)) for r, each in enumerate(environments)]
        failed_at = None
        timed_out = False
        while any(process.poll() is None for process in processes):
            now = time.monotonic()
            if failed_at is None and any(process.poll() not in (None, 0) for process in processes):
                failed_at = now
            timed_out = now - started > timeout
            if timed_out or (failed_at is not None and now - failed_at > 10) or (kill_when is not None and kill_when()):
                _kill(processes)
            time.sleep(0.005)
        outputs = [(Path(folder) / f"{rank}.out").read_text(errors="replace") for rank in range(ranks)]
        errors = [(Path(folder) / f"{rank}.err").read_text(errors="replace") for rank in range(ranks)]
    finished = Finished([p.returncode for p in processes], outputs, errors, time.monotonic() - started)
    assert not timed_out, f"not done after {timeout} s\n{finished.report()}"
    assert not check or not any(finished.codes), finished.report()
    return finished


def _environment(rank: int, ranks: int, port: int, threads: int) -> dict[str, str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    if ranks > 1:
        numbers = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
        environment |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}
    return environment


def _start(arguments: Sequence[str], environment: dict[str, str], logs: Path) -> subprocess.Popen[bytes]:
    with open(logs.with_suffix(".out"), "wb") as output, open(logs.with_suffix(".err"), "wb") as error:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=error, start_new_session=True
        )


def _fork(arguments: Sequence[str], environment: dict[str, str], logs: Path) -> ForkedRank:
    return rank_server().start(arguments, environment, logs.with_suffix(".out"), logs.with_suffix(".err"))


def _kill(processes: Sequence[subprocess.Popen[bytes] | ForkedRank]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()
