"""Kinds of numbers: in recipes tokens as people write them (15B, 0.5M, 1_000_000, 4Ki) and seeds; sizes as text."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_PATTERN = re.compile(r"([0-9][0-9_]*(?:\.[0-9_]+)?(?:[eE]\+?[0-9]+)?)\s*(K|M|B|T|Ki|Mi|Gi)?")


def parse_tokens(value: Any) -> Any:
    """A count from text such as '15B' (K, M, B, T: powers of 1000; Ki, Mi, Gi: of 1024); anything but text as it is.

    Raises ValueError for text that is no whole number of tokens.
    """
    if not isinstance(value, str):
        return value
    match = _PATTERN.fullmatch(value.strip())
    number = Decimal(match[1].replace("_", "")) * _SUFFIXES[match[2] or ""] if match else None
    if number is None or number != int(number):
        raise ValueError("write a whole number of tokens, such as 1000000, 1_000_000, 15B, 0.5M or 4Ki")
    return int(number)


Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""The seed of a generator."""

Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(ge=1)]
"""A positive number of tokens; in a recipe also as '15B' or '4Ki'."""

TokensOrZero = Annotated[int, BeforeValidator(parse_tokens), Field(ge=0)]
"""A number of tokens that may be 0."""


def size_text(count: float) -> str:
    """A number of bytes as text: 950 B, 12.3 kB, 4.6 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.1f} TB"
