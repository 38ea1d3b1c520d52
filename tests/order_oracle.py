"""The order of documents and rows once more, slowly, sharing no code with the reader."""

import hashlib
import math
import tarfile

import numpy as np

MASK = 2**64 - 1


def permuted(value, size, key):
    """One entry of the permutation, in Python's own integers, as the module's docstring and references define it."""
    digest = hashlib.sha512(key.encode()).digest()
    keys = [int.from_bytes(digest[at : at + 8], "little") for at in range(0, 64, 8)]
    rows = math.ceil(math.sqrt(size))
    columns = math.ceil(size / rows)
    while True:
        left, right = divmod(value, columns)
        for number, round_key in enumerate(keys):
            mixed = (right if number % 2 == 0 else left) ^ round_key
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & MASK
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & MASK
            mixed = (mixed ^ (mixed >> 31)) >> 32
            if number % 2 == 0:
                left = (left + (mixed * rows >> 32)) % rows
            else:
                right = (right + (mixed * columns >> 32)) % columns
        value = left * columns + right
        if value < size:
            return value


def stored_documents(shards):
    """Every document's tokens, read by tarfile alone."""
    found = []
    for path in sorted(shards.folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [np.frombuffer(tar.extractfile(member).read(), "<u2").tolist() for member in tar]
    return found


def padded(texts, order, eos, grid):
    """Inputs, targets and resets of the documents in this order, laid end to end."""
    stream = []
    for place in order:
        document = texts[place]
        for offset in range(-(-len(document) // grid) * grid):
            before = document[offset - 1] if 0 < offset < len(document) else eos
            target = document[offset] if offset < len(document) else -100
            stream.append((before, target, offset == 0))
    return stream


def epoch_order(number, seed, epoch, name=""):
    """The documents of an epoch of a stream, in order."""
    return [permuted(place, number, f"{name}documents {seed} {epoch}") for place in range(number)]
