"""Cases that are launched together for several tests: those of the tests that this run of pytest goes through."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case")


def cases(listed: Iterable[Case], *, often: Container[str], name: Callable[[Case], str] = str) -> list[Any]:
    """For `parametrize`: cases of which those are slow that are not named in `often`."""
    return [
        case if name(case) in often else pytest.param(case, marks=pytest.mark.slow, id=name(case)) for case in listed
    ]


def chosen(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """The values of a parameter with which tests of the requesting module are run, each once."""
    here = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    values: list[Any] = []
    for item in here:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if parameter in params and params[parameter] not in values:
            values.append(params[parameter])
    return values
