"""Tables of a markdown file that are written from results: what stands between two markers is replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pretrain.errors import UserError

END = "<!-- end -->"
_START = re.compile(r"<!-- table: (.*?) -->")


def replace_tables(text: str, tables: Mapping[str, str], where: str) -> str:
    """`text` with the markdown table of its study between each `<!-- table: STUDY -->` and `<!-- end -->`.

    Both markers are lines of their own. Raises UserError, naming `where` and the line, for a study that `tables` does
    not have, a marker without its other half, and a text without any.
    """
    lines: list[str] = []
    study, opened = None, 0
    for number, line in enumerate(text.splitlines(), start=1):
        start = _START.fullmatch(line.strip())
        if start is not None:
            if study is not None:
                raise UserError(f"{where}:{number}: a table starts inside that of line {opened}; close it with {END}")
            study, opened = start[1], number
            if study not in tables:
                raise UserError(f"{where}:{number}: unknown study {study!r}; there are {', '.join(tables)}")
            lines += [line, tables[study]]
        elif line.strip() == END:
            if study is None:
                raise UserError(f"{where}:{number}: {END} without a table; put <!-- table: STUDY --> before it")
            study = None
            lines.append(line)
        elif study is None:
            lines.append(line)
    if study is not None:
        raise UserError(f"{where}:{opened}: the table of {study!r} is not closed; put {END} on a line after it")
    if not opened:
        raise UserError(f"{where}: has no table; put <!-- table: STUDY --> and {END} where one belongs")
    return "\n".join(lines) + "\n"
