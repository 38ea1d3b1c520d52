"""Rows to train on, as arrays."""

from typing import NamedTuple

import numpy as np

IGNORE_INDEX = -100


class Rows(NamedTuple):
    """Inputs, targets and beginnings of n rows."""

    tokens: np.ndarray
    """int64 [n, length]."""
    targets: np.ndarray
    """int64 [n, length], IGNORE_INDEX where there is none."""
    resets: np.ndarray | None = None
    """bool [n, length], True at the first token of a document, or of a row that goes on from no other, where the
    model's state begins anew; None where it does at the first token of each row alone."""
