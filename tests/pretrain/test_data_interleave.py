"""Which source a row is of: exact shares, any row on its own, limits that hand their share on."""

from fractions import Fraction

import pytest

from pretrain.data.interleave import Interleave


def weights(*texts):
    return [Fraction(text) for text in texts]


@pytest.mark.parametrize(
    "shares", [("0.7", "0.3"), ("1", "2", "4"), ("0.5", "0.25", "0.125", "0.125"), ("0", "1"), ("1",)]
)
def test_rows_follow_each_other_within_their_source_and_shares_are_exact(shares):
    mix, total = Interleave(weights(*shares)), sum(weights(*shares))
    seen = [0] * len(shares)
    for row in range(1000):
        assert mix.counts(row) == seen
        source, number = mix.locate(row)
        assert number == seen[source]
        seen[source] += 1
        for count, share in zip(seen, weights(*shares), strict=True):
            assert abs(count - (row + 1) * share / total) < len(shares)
    assert mix.end is None


def test_shares_are_what_is_written_however_far():
    mix = Interleave(weights("0.3", "0.6", "0.1"))
    assert mix.counts(10**15) == [3 * 10**14, 6 * 10**14, 10**14]


def test_a_source_at_its_limit_leaves_its_share_to_the_others_in_their_proportions():
    mix = Interleave(weights("0.5", "0.2", "0.3"), [100, None, None])
    sources = [mix.locate(row)[0] for row in range(1200)]
    assert sources.count(0) == 100
    last = max(row for row, source in enumerate(sources) if source == 0)
    assert 198 <= last <= 202
    behind = sources[last + 1 :]
    assert behind.count(1) == pytest.approx(0.4 * len(behind), abs=2)
    for source in (1, 2):
        numbers = [mix.locate(row)[1] for row in range(1200) if sources[row] == source]
        assert numbers == list(range(len(numbers)))


def test_rows_end_where_every_source_is_at_its_limit():
    mix = Interleave(weights("1", "1", "2"), [3, 5, 4])
    assert mix.end == 12
    assert mix.counts(12) == [3, 5, 4]
    assert sorted(mix.locate(row) for row in range(12)) == [
        (i, n) for i, limit in enumerate((3, 5, 4)) for n in range(limit)
    ]
    with pytest.raises(IndexError):
        mix.locate(12)


def test_rows_read_before_count_against_limits_and_go_on_in_numbers():
    mix = Interleave(weights("1", "1"), [10, None], before=[8, 100])
    found = [mix.locate(row) for row in range(8)]
    assert [number for source, number in found if source == 0] == [8, 9]
    assert [number for source, number in found if source == 1] == [100, 101, 102, 103, 104, 105]
    assert Interleave(weights("1", "1"), [3, 4], before=[3, 4]).end == 0
