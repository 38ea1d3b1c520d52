"""Permutations of any size whose entries are each computed on their own.

They are generalised Feistel networks (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): any entry in
O(1), a definition of a few lines of integer arithmetic, and so an order that does not depend on the version of a random
number library.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import isqrt

import numpy as np

# Entries are permuted in blocks of this many, which stay in the processor's cache with their scratch space.
_BLOCK = 1 << 15
_THREADS = 4  # numpy lets go of the interpreter in each operation on a block


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a permutation of range(size), chosen by `key`, sends each entry of `index`: int64 [n] -> int64 [n]."""
    out = np.empty(len(index), np.int64)
    network = _Network(size, key)

    def send(start: int) -> None:
        network.send(index[start : start + _BLOCK].astype(np.uint64), out[start : start + _BLOCK])

    _each_block(len(index), send)
    return out


def permutation(size: int, key: str) -> np.ndarray:
    """`permute` of all of range(size): int32 or int64 [size]."""
    out = np.empty(size, np.int32 if size < 2**31 else np.int64)
    network = _Network(size, key)

    def send(start: int) -> None:
        stop = min(start + _BLOCK, size)
        network.send(np.arange(start, stop, dtype=np.uint64), out[start:stop])

    _each_block(size, send)
    return out


def _each_block(size: int, send: Callable[[int], None]) -> None:
    starts = range(0, size, _BLOCK)
    threads = min(_THREADS, len(os.sched_getaffinity(0)), len(starts) // 8)
    if threads < 2:
        for start in starts:
            send(start)
        return
    with ThreadPoolExecutor(threads, "permutation") as pool:
        list(pool.map(send, starts, chunksize=1))


class _Network:
    """A permutation of range(size)."""

    def __init__(self, size: int, key: str) -> None:
        self._rounds = np.frombuffer(hashlib.sha512(key.encode()).digest(), "<u8")
        self._size = np.uint64(size)
        rows = isqrt(max(size, 1) - 1) + 1
        self._rows, self._columns = np.uint64(rows), np.uint64(-(-size // rows))

    def send(self, value: np.ndarray, out: np.ndarray) -> None:
        """Writes where each of `value`, uint64 [n], goes into `out`, whole numbers [n]."""
        value = self._once(value)
        # The network permutes rows * columns >= size entries: those that leave the range walk on until they are back.
        outside = np.flatnonzero(value >= self._size)
        while len(outside):
            value[outside] = self._once(value[outside])
            outside = outside[value[outside] >= self._size]
        out[:] = value.view(np.int64)

    def _once(self, value: np.ndarray) -> np.ndarray:
        left = value // self._columns
        right = value - left * self._columns
        mixed, shifted = np.empty_like(left), np.empty_like(left)
        for number, key in enumerate(self._rounds):
            source, target, size = (left, right, self._columns) if number % 2 else (right, left, self._rows)
            _mix(source, key, mixed, shifted)
            # target = (target + a number in range(size) drawn from the upper 32 bits) modulo size, for size < 2^32;
            # below zero the unsigned difference wraps around and is the larger one.
            np.right_shift(mixed, np.uint64(32), out=mixed)
            np.multiply(mixed, size, out=mixed)
            np.right_shift(mixed, np.uint64(32), out=mixed)
            np.add(target, mixed, out=target)
            np.subtract(target, size, out=mixed)
            np.minimum(target, mixed, out=target)
        left *= self._columns
        left += right
        return left


def _mix(value: np.ndarray, key: np.uint64, out: np.ndarray, scratch: np.ndarray) -> None:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014) of value ^ key."""
    np.bitwise_xor(value, key, out=out)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        np.right_shift(out, np.uint64(shift), out=scratch)
        np.bitwise_xor(out, scratch, out=out)
        if factor is not None:
            np.multiply(out, np.uint64(factor), out=out)
