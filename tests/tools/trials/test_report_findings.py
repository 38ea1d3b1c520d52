"""Tables in a markdown file are replaced between their markers, and nothing else."""

from __future__ import annotations

import pytest

from pretrain.errors import UserError
from tools.trials.findings import replace_tables

TABLES = {"one": "| 1 |", "two": "| 2 |"}


def test_tables_are_replaced_and_the_text_around_them_stays():
    text = "# Title\n<!-- table: two -->\nold\n\nolder\n<!-- end -->\nbetween\n<!-- table: one -->\n<!-- end -->\nend\n"
    new = replace_tables(text, TABLES, "F.md")
    assert new == (
        "# Title\n<!-- table: two -->\n| 2 |\n<!-- end -->\nbetween\n<!-- table: one -->\n| 1 |\n<!-- end -->\nend\n"
    )
    assert replace_tables(new, TABLES, "F.md") == new


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n<!-- table: three -->\n<!-- end -->", "F.md:2: unknown study 'three'; there are one, two"),
        ("<!-- table: one -->\ntext", "F.md:1: the table of 'one' is not closed"),
        ("<!-- table: one -->\n<!-- table: two -->\n<!-- end -->", "F.md:2: a table starts inside that of line 1"),
        ("text\n<!-- end -->", "F.md:2: <!-- end --> without a table"),
        ("text", "F.md: has no table"),
    ],
)
def test_markers_that_do_not_pair_are_named(text, message):
    with pytest.raises(UserError, match=f"^{message}"):
        replace_tables(text, TABLES, "F.md")
