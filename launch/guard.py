"""Holds the process group of a launch, and ends all of it when the launcher is gone, however the launcher died.

Run by path with nothing but the standard library. It leads the process group that the ranks join and waits on a pipe
whose other end only the launcher holds: the kernel closes that end even when the launcher is killed with SIGKILL, and
then the ranks and all that they started are killed. Signals meant for the ranks pass it by.
"""

import os
import signal
import sys


def main() -> None:
    """Say that the group is ready, wait for the launcher's end, kill the group (this process with it)."""
    # Some of Slurm's plugins signal all processes of a step.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
