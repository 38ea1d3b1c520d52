"""Cases that are launched together for several tests: those of the tests that this run of pytest goes through."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def cases(listed: Iterable[Any], *, often: Container[str]) -> list[Any]:
    """For `parametrize`: cases, named by `str`, of which those are slow that `often` does not name."""
    slow = [pytest.mark.slow]
    return [pytest.param(case, id=str(case), marks=[] if str(case) in often else slow) for case in listed]


def chosen(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """The values of a parameter with which tests of the requesting module are run, each once."""
    here = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    values: list[Any] = []
    for item in here:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if parameter in params and params[parameter] not in values:
            values.append(params[parameter])
    return values
