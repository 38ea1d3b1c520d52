"""Encodes batches of documents in processes of their own: `python -m tools.shards.encoder TOKENIZER DTYPE`.

The processes are started anew, not forked, so that they hold nothing but the tokenizer, and talk over their standard
input and output: to a process the number of texts, the bytes of each (uint64), and the texts in UTF-8; back the
tokens of each (uint64), and the tokens. They end when their input does, and so with their parent.
"""

import contextlib
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, TypeVar

import numpy as np

from pretrain.errors import UserError
from tools.encoding import Tokenizer

BATCHES_AHEAD_PER_WORKER = 3
T = TypeVar("T")
Process = subprocess.Popen


class Encoders:
    """Encodes in `workers` processes, or in this one where that is 1; any number gives the same. A context manager."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, workers: int) -> None:
        """`tokenizer` has an EOS, which is put behind every document; `dtype` holds its ids."""
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, "encode") if workers > 1 else None
        self._processes: list[Process] = []
        self._idle: SimpleQueue[Process] = SimpleQueue()

    def __enter__(self) -> "Encoders":
        if self._pool is not None:
            command = [sys.executable, "-m", "tools.shards.encoder", str(self._tokenizer.path), self._dtype.name]
            for _ in range(self._workers):
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                self._processes.append(process)
                self._idle.put(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.wait()
            process.stdout.close()
            # What was still to be written to it has nowhere to go.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    def encode(self, batches: Iterable[tuple[T, Sequence[bytes]]]) -> Iterator[tuple[T, list[bytes]]]:
        """For each batch, in order, what stands beside its texts (UTF-8), and the tokens of each text, EOS the last.

        Raises UserError when a process ends before its time.
        """
        if self._pool is None:
            for beside, texts in batches:
                yield beside, encode_texts(self._tokenizer, self._dtype, texts)
            return
        ahead: deque[tuple[T, Future[list[bytes]]]] = deque()
        for beside, texts in batches:
            ahead.append((beside, self._pool.submit(self._encode_there, texts)))
            if len(ahead) >= BATCHES_AHEAD_PER_WORKER * self._workers:
                beside, tokens = ahead.popleft()
                yield beside, tokens.result()
        for beside, tokens in ahead:
            yield beside, tokens.result()

    def _encode_there(self, texts: Sequence[bytes]) -> list[bytes]:
        process = self._idle.get()
        try:
            write_parts(process.stdin, [len(text) for text in texts], texts)
            lengths = read_lengths(process.stdout)
            if lengths is None:
                raise EOFError
            return [_read(process.stdout, length * self._dtype.itemsize) for length in lengths]
        except (OSError, EOFError, ValueError) as error:
            code = process.wait()
            raise UserError(f"an encoding process {_ending(code)}; the same command goes on") from error
        finally:
            self._idle.put(process)


def encode_texts(tokenizer: Tokenizer, dtype: np.dtype, texts: Sequence[bytes]) -> list[bytes]:
    """The tokens of each text (UTF-8), EOS the last, as raw numbers of `dtype`."""
    encoded = tokenizer.encode_documents([text.decode() for text in texts], threads=1)
    return [np.array([*tokens, tokenizer.eos_id], dtype).tobytes() for tokens in encoded]


def write_parts(file: BinaryIO, lengths: Sequence[int], parts: Sequence[bytes]) -> None:
    """Writes the number of parts, their lengths, and the parts."""
    file.write(struct.pack(f"<Q{len(lengths)}Q", len(lengths), *lengths))
    for part in parts:
        file.write(part)
    file.flush()


def read_lengths(file: BinaryIO) -> tuple[int, ...] | None:
    """The lengths that `write_parts` wrote; None at the end of the file."""
    head = file.read(8)
    if not head:
        return None
    (number,) = struct.unpack("<Q", head)
    return struct.unpack(f"<{number}Q", _read(file, 8 * number))


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} (its own message is above)"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory? give fewer --workers)" if name == "SIGKILL" else "")


def main(path: str, dtype_name: str) -> None:
    """Serves batches until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    tokenizer, dtype = Tokenizer.open(Path(path)), np.dtype(dtype_name).newbyteorder("<")
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (lengths := read_lengths(source)) is not None:
        tokens = encode_texts(tokenizer, dtype, [_read(source, length) for length in lengths])
        write_parts(sink, [len(data) // dtype.itemsize for data in tokens], tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
