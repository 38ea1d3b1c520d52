"""A process that has imported what ranks import, and forks them: `python tests/rank_server.py`.

Importing PyTorch and DeepSpeed takes seconds of CPU for each process, and the tests start hundreds. Each line on
standard input is a rank to start, as JSON: `arguments` as behind `python`, `environment`, `output` and `error`
(files). Each line on standard output is {"pid"}, in the order of the requests, or {"pid", "code"} of a rank that has
ended (negative: by that signal). The end of standard input is the end of the server.

A forked rank is a session of its own with the environment asked for, but what reads the environment while a module is
imported has read the server's, and all ranks share one seed of `hash`.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import sys
from types import ModuleType
from typing import Any

POLL_SECONDS = 0.01


def serve() -> dict[str, Any] | None:
    """Fork on request. Returns the request in a rank, and None in the server, at its end."""
    gc.freeze()
    running: set[int] = set()
    pending = b""
    while True:
        if select.select([0], [], [], POLL_SECONDS if running else None)[0]:
            received = os.read(0, 1 << 16)
            if not received:
                return None
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    return json.loads(line)
                running.add(pid)
                tell(pid=pid)
        for pid in [*running]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                tell(pid=pid, code=os.waitstatus_to_exitcode(status))


def tell(**fields: int) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


def become(request: dict[str, Any]) -> None:
    """Be the rank that is asked for."""
    os.setsid()
    for descriptor, path in ((1, request["output"]), (2, request["error"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.environ.clear()
    os.environ.update(request["environment"])
    first, *rest = request["arguments"]
    if first == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(module))
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    import pretrain.loop
    import pretrain.preflight  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    request = serve()
    if request is not None:
        become(request)


if __name__ == "__main__":
    main()
