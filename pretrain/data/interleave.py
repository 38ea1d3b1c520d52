"""Which of several sources each row of a run is of: a pure function of the row's number, in exact arithmetic.

Of the first n rows source i has n w_i, to within as many rows as there are sources: the first source has floor(n w_1)
of them, the second floor of its share of what is left, and so on; any row is found without those before it. A source
that has reached its limit leaves its share to the others from there on, in their proportions.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class _Stage:
    """Rows from `first` on, of the sources `members`."""

    first: int
    before: tuple[int, ...]
    """Rows of every source that come before."""
    members: tuple[int, ...]
    shares: tuple[tuple[int, int], ...]
    """Of each member, as a fraction of what those before it leave over."""

    def counts(self, rows: int) -> list[int]:
        """Rows of every source among those before and the first `rows` of the stage."""
        found = list(self.before)
        for member, (numerator, denominator) in zip(self.members, self.shares, strict=True):
            own = rows * numerator // denominator
            found[member] += own
            rows -= own
        return found


class Interleave:
    """The sources of rows 0, 1, ...; immutable."""

    def __init__(
        self, weights: Sequence[Fraction], limits: Sequence[int | None] | None = None, before: Sequence[int] = ()
    ) -> None:
        """`weights`: of the sources, at least one above 0; `limits`: rows that a source has at the most; `before`: rows
        of each that were read already, before row 0.
        """
        self._weights = list(weights)
        self._limits = [None] * len(weights) if limits is None else list(limits)
        self._stages = [self._stage(0, tuple(before) or (0,) * len(weights))]
        self.end: int | None = None
        """Rows after which every source has reached its limit; None: there is no such row."""
        while self._stages[-1].members:
            following = self._after(self._stages[-1])
            if following is None:
                return
            self._stages.append(following)
        self.end = self._stages.pop().first if len(self._stages) > 1 else 0

    def counts(self, row: int) -> list[int]:
        """Rows of each source among the first `row`, and those read before."""
        stage = self._at(row)
        return stage.counts(row - stage.first)

    def locate(self, row: int) -> tuple[int, int]:
        """The source of a row, and the row's number among those of that source. Raises IndexError behind the end."""
        if self.end is not None and row >= self.end:
            raise IndexError(row)
        stage = self._at(row)
        before, after = stage.counts(row - stage.first), stage.counts(row - stage.first + 1)
        source = next(i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y)
        return source, before[source]

    def _at(self, row: int) -> _Stage:
        if len(self._stages) == 1:
            return self._stages[0]
        return self._stages[bisect_right(self._stages, row, key=lambda stage: stage.first) - 1]

    def _stage(self, first: int, before: tuple[int, ...]) -> _Stage:
        members = tuple(
            i
            for i, (weight, limit) in enumerate(zip(self._weights, self._limits, strict=True))
            if weight > 0 and (limit is None or before[i] < limit)
        )
        left = sum((self._weights[i] for i in members), Fraction(0))
        shares = []
        for i in members:
            share = self._weights[i] / left
            shares.append((share.numerator, share.denominator))
            left -= self._weights[i]
        return _Stage(first, before, members, tuple(shares))

    def _after(self, stage: _Stage) -> _Stage | None:
        """The stage that begins where a member would go beyond its limit; None where none has one."""
        limited = [i for i in stage.members if self._limits[i] is not None]
        if not limited:
            return None

        def fits(rows: int) -> bool:
            counts = stage.counts(rows)
            return all(counts[i] <= self._limits[i] for i in limited)

        low, high = 0, 1
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return self._stage(stage.first + low, tuple(stage.counts(low)))
