"""Cases measured in worker processes: each result as soon as it is there, a case that fails reported as failed.

On a CPU every case has a process of its own, so that none finds the memory as another left it. On a GPU one
process measures all, which spares the start of CUDA and the kernels' compilation; a case that breaks it costs a new
process, not the other cases.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""A case's parameters and what was measured; of a case without a measurement, `outcome` and `why`."""

OUT_OF_MEMORY = "out of memory"
FAILED = "failed"
NOT_RUN = "not run"
NOT_SUPPORTED = "not supported"
CASE_SECONDS = {"cuda": 90.0, "cpu": 1800.0}
"""By device: a GPU's time is short, and a kernel that hangs must not take all of it."""
LAST_LINES = 6
"""Lines of a failure's output that are kept."""
REPOSITORY = Path(__file__).parents[2]


def grid(values: Mapping[str, Sequence[Any]]) -> list[Row]:
    """All combinations: the first values of all, then those in which one differs, then two and so on, so that what is
    measured before time runs out shows each parameter's influence.
    """
    names = list(values)
    combined = [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values.values())]
    return sorted(combined, key=lambda case: sum(case[name] != values[name][0] for name in names))


def run_cases(
    function: str,
    cases: Sequence[Row],
    settings: Row,
    *,
    deadline: float | None = None,
    together: bool | None = None,
    case_seconds: float | None = None,
) -> Iterator[Row]:
    """Calls a function for each case in worker processes; gives the cases' rows in their order.

    Args:
        function: `module:name` of a function that takes a case's parameters and `settings` as keyword arguments and
            returns JSON-ready values by name.
        settings: keyword arguments that are the same for all cases, `device` among them; they are not part of the rows.
        deadline: by `time.monotonic()`; a case that is not done by then is cut off, and the rest are not run.
        together: one process for all cases, as long as none breaks it; None: on a GPU.
        case_seconds: after which a case counts as failed, the start of a process included; None: `CASE_SECONDS`.
    """
    together = settings["device"] == "cuda" if together is None else together
    case_seconds = CASE_SECONDS[settings["device"]] if case_seconds is None else case_seconds
    left = list(cases)
    while left:
        if deadline is not None and time.monotonic() >= deadline:
            yield from ({**case, "outcome": NOT_RUN, "why": "the minutes were used up"} for case in left)
            return
        batch = list(left) if together else left[:1]
        worker = _Worker(function, batch, settings)
        try:
            for case in batch:
                limit = time.monotonic() + case_seconds
                result = worker.next_result(limit if deadline is None else min(limit, deadline))
                left.pop(0)
                yield {**case, **(worker.failure(case_seconds, deadline) if result is None else result)}
                if result is None:
                    break  # the process is gone: a new one for those that are left
        finally:
            worker.end()


class _Worker:
    """A process that measures cases and sends a line of JSON for each through a pipe of its own."""

    def __init__(self, function: str, cases: Sequence[Row], settings: Row) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed in end())
        self._wanted, self._timed_out, self._received = len(cases), False, b""
        read, write = os.pipe()
        self._results = read
        work = json.dumps({"function": function, "cases": list(cases), "settings": settings})
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench.worker", str(write)],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        os.close(write)
        try:
            self._process.stdin.write(work.encode())
            self._process.stdin.close()
        except BrokenPipeError:  # it died at its start: no result will come, and its output says why
            self._process.wait()

    def next_result(self, until: float) -> Row | None:
        """The next case's result; None where the process has ended, or did not give it in time (it is killed then)."""
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._results], [], [], max(0.0, min(until - time.monotonic(), 3600.0)))
            if not ready:
                if time.monotonic() < until:
                    continue
                self._timed_out = True
                self._process.kill()
                return None
            part = os.read(self._results, 1 << 16)
            if not part:
                return None
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        self._wanted -= 1
        return json.loads(line)

    def failure(self, case_seconds: float, deadline: float | None) -> Row:
        """Why there was no result: the limit, the signal, or the last lines of the process's output."""
        if self._timed_out:
            if deadline is not None and time.monotonic() >= deadline:
                return {"outcome": NOT_RUN, "why": "the minutes were used up while it ran"}
            return {"outcome": FAILED, "why": f"took longer than {case_seconds:.0f} s"}
        code = self._process.wait()
        self._output.seek(0)
        lines = last_lines(self._output.read().decode(errors="replace"))
        if code < 0:
            killed = " (the system may have run out of memory)" if -code == signal.SIGKILL else ""
            lines = f"killed by {signal.Signals(-code).name}{killed}\n{lines}".strip()
        return {"outcome": FAILED, "why": lines or f"exit code {code} without a word"}

    def end(self) -> None:
        """Ends the process, and lets go of its pipe and output."""
        if self._wanted > 0:
            self._process.kill()
        self._process.wait()
        os.close(self._results)
        self._output.close()


def last_lines(text: str, number: int = LAST_LINES) -> str:
    """The last lines of a text that are not empty."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-number:])
