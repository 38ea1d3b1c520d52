"""What the commands of this folder share: exit codes, progress lines, and errors of writing."""

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import progress
from rich.console import Console

from pretrain.errors import UserError

LINE_SECONDS = 10.0
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_command(command: Callable[[], None]) -> int:
    """Runs `command` and returns its exit code: 0, 2 after a UserError, 130 after Ctrl-C."""
    try:
        command()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        discard_output()  # its reader (head, less) has seen enough
    except OSError as error:
        if error.errno not in NO_SPACE or error.filename is not None:
            raise
        discard_output()
        print(
            f"error: the output cannot be written: {error.strerror}; free space or send it elsewhere", file=sys.stderr
        )
        return 2
    return 0


def discard_output() -> None:
    """Sends what is left of an output that can't be written nowhere: python would complain again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1; underscores are allowed."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def not_negative_int(text: str) -> int:
    """An argparse type: a whole number of at least 0; underscores are allowed."""
    return 0 if text == "0" else positive_int(text)


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def seed(text: str) -> int:
    """An argparse type: a whole number that torch's generators take, 0 to 2^63 - 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{value} must be at least 0 and below 2^63")
    return value


def read_text(path: Path, name: str) -> str:
    """A UTF-8 file's text; raises UserError, which calls it `name`, where it can't be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 at byte {error.start}; convert it") from None


def changed_options(add: Callable[[argparse.ArgumentParser], None], arguments: argparse.Namespace) -> list[str]:
    """The options, of those that `add` gives to a parser, that hold another value than their default."""
    parser = argparse.ArgumentParser()
    add(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(arguments, name) != value]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of writing to `path` into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(
                f"{path}: no space left on its disk ({error.strerror}); free space or choose another"
            ) from error
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


class Progress:
    """A line on stderr with the share done, counts, speed and time left.

    A bar that moves on a terminal, else a new line every 10 s.
    """

    def __init__(self, total: int) -> None:
        """`total`: in the unit that `update` is given."""
        self._start = self._shown = time.monotonic()
        self._bar = progress.Progress(
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.description}"),
            progress.TextColumn("{task.fields[left]}"),
            console=Console(stderr=True),
            transient=True,
            speed_estimate_period=60,  # so that what was quick, such as skipping, soon no longer counts
        )
        self._task = self._bar.add_task("", total=max(total, 1), left="")
        self._on_terminal = self._bar.console.is_terminal
        if self._on_terminal:
            self._bar.start()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def update(self, done: int, text: str) -> None:
        """Shows `text` and the time left if it is time to."""
        task = self._bar.tasks[0]
        seconds = task.time_remaining
        left = f"{duration(seconds)} left" if seconds else ""
        self._bar.update(self._task, completed=done, description=text, left=left)
        now = time.monotonic()
        if self._on_terminal or now - self._shown < LINE_SECONDS:
            return
        self._shown = now
        print(", ".join(x for x in (f"{int(task.percentage):3d} %  {text}", left) if x), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clears the line on a terminal."""
        if self._on_terminal:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds as text: 42 s, 3 min 05 s, 2 h 07 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def count(value: float) -> str:
    """A count as text with three digits: 950, 12.3 k, 4.56 M, 7.89 G."""
    for unit in ("", " k", " M"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} G"
