"""Spans of tokens as options give them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pretrain.errors import UserError
from tools.inspect.text import Reading, sentences


def span(text: str) -> range:
    """An argparse type: START:END, tokens START to END - 1."""
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is no START:END of tokens, START below END")
    return range(int(start), int(stop))


def spans_of(reading: Reading, asked: Sequence[range] | None) -> list[range]:
    """The spans that were asked for, or each sentence of the text that was read.

    Raises:
        UserError: a span is not inside the text.
    """
    for given in asked or ():
        if given.start < reading.text.start or given.stop > reading.text.stop:
            raise UserError(
                f"--span {given.start}:{given.stop}: the text is tokens {reading.text.start}:{reading.text.stop}, "
                "behind an EOS; give a span inside it"
            )
    if asked is not None:
        return list(asked)
    inside = (reading.of_bytes(*edges) for edges in sentences(reading.words))
    return [found for found in inside if found]
