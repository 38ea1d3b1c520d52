"""Numbers as the command's JSON has them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

DIGITS = 7
"""Significant digits of numbers in JSON: what fp32 has."""


def numbers(values: np.ndarray) -> Any:
    """An array as nested lists with 7 significant digits; null for what is no finite number."""
    if values.ndim:
        return [numbers(part) for part in values]
    value = float(values)
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
