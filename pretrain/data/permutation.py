"""Permutations of any size whose entries are each computed on their own.

They are generalised Feistel networks (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): any entry in
O(1), a definition of a few lines of integer arithmetic, and so an order that does not depend on the version of a random
number library.
"""

import hashlib
from math import isqrt

import numpy as np

# Entries are permuted in blocks of this many, which stay in the processor's cache.
_BLOCK = 1 << 15


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a permutation of range(size), chosen by `key`, sends each entry of `index`: int64 [n] -> int64 [n]."""
    if index.size > _BLOCK:
        blocks = np.array_split(index, -(-index.size // _BLOCK))
        return np.concatenate([permute(block, size, key) for block in blocks])
    rounds = np.frombuffer(hashlib.sha512(key.encode()).digest(), "<u8")
    rows = np.uint64(isqrt(size - 1) + 1)
    columns = np.uint64(-(-size // int(rows)))
    out = _feistel(index.astype(np.uint64), rows, columns, rounds)
    # The network permutes rows * columns >= size entries: those that leave the range walk on until they are back.
    while (outside := out >= np.uint64(size)).any():
        out[outside] = _feistel(out[outside], rows, columns, rounds)
    return out.astype(np.int64)


def _feistel(value: np.ndarray, rows: np.uint64, columns: np.uint64, rounds: np.ndarray) -> np.ndarray:
    left, right = np.divmod(value, columns)
    for number, key in enumerate(rounds):
        if number % 2:
            right = _shifted(right, _mixed(left, key), columns)
        else:
            left = _shifted(left, _mixed(right, key), rows)
    return left * columns + right


def _shifted(value: np.ndarray, mixed: np.ndarray, size: np.uint64) -> np.ndarray:
    """(value + a number in range(size) drawn from the upper 32 bits of `mixed`) modulo size, for size < 2^32."""
    value = value + (((mixed >> np.uint64(32)) * size) >> np.uint64(32))
    return np.where(value >= size, value - size, value)


def _mixed(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    value = value ^ key
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
