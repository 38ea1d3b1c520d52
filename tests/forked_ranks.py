"""Ranks that are forked by `rank_server`, one server for each process that runs tests: its client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class ForkedRank:
    """What is used of `subprocess.Popen`."""

    def __init__(self, server: _Server, pid: int) -> None:
        self.pid = pid
        self._server = server

    @property
    def returncode(self) -> int | None:
        return self._server.codes[self.pid]

    def poll(self) -> int | None:
        self._server.listen()
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.005)
        return code


class _Server:
    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "tests/rank_server.py"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        os.set_blocking(self._replies.fileno(), False)
        self._pending = b""
        self._started: list[int] = []
        self.codes: dict[int, int | None] = {}

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], output: Path, error: Path) -> ForkedRank:
        request = {"environment": {**environment}, "output": str(output), "error": str(error)}
        self._requests.write(json.dumps({"arguments": [*arguments], **request}).encode() + b"\n")
        self._requests.flush()
        while not self._started:
            time.sleep(0.005)
            self.listen()
        return ForkedRank(self, self._started.pop(0))

    def listen(self) -> None:
        """Take in what the server has said."""
        assert self._process.poll() is None, "tests/rank_server.py has ended"
        *lines, self._pending = (self._pending + (self._replies.read() or b"")).split(b"\n")
        for line in lines:
            said = json.loads(line)
            self.codes[said["pid"]] = said.get("code")
            if "code" not in said:
                self._started.append(said["pid"])


@cache
def rank_server() -> _Server:
    """The one of this process, started when it is first asked for."""
    return _Server()
