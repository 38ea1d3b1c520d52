"""Lists of names on the command line."""

import difflib
from collections.abc import Sequence

from pretrain.errors import UserError


def listed(text: str, known: Sequence[str], option: str) -> list[str]:
    """The names of a list with commas, once each, `all` for all; raises UserError for one that is not known."""
    if text.strip() == "all":
        return list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{option}: names nothing; choose of {', '.join(known)}, or all")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f", did you mean {near[0]}?" if near else "."
            raise UserError(f"{option}: there is no task {name!r}{meant} There are: {', '.join(known)}")
    return list(dict.fromkeys(names))
