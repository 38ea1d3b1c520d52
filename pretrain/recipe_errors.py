"""Validation errors in a user's words: the field by its dotted name, the value, and what to write instead."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line for each thing that is wrong."""
    problems: dict[tuple[str, ...], Any] = {}
    for problem in error.errors(include_url=False):
        names = _field_path(root, tuple(str(part) for part in problem["loc"]), problem["type"])
        if names in problems:  # the value fits none of several types
            problem["msg"] = f"{problems[names]['msg']}; or: {problem['msg']}"
        problems[names] = problem
    return "\n".join(_line(names, problem, root) for names, problem in problems.items())


def _field_path(root: type[BaseModel], names: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """A problem's place without what pydantic puts behind a field, such as the type of a union that it tried."""
    section: type[BaseModel] | None = root
    for position, name in enumerate(names):
        if section is None:
            return names[: position + name.isdigit()]  # an element of a tuple is part of the place
        if name not in section.model_fields:
            return names[: position + (kind == "extra_forbidden")]
        section = _config_in(section.model_fields[name].annotation)
    return names


def section_class(root: type[BaseModel], path: tuple[str, ...]) -> type[BaseModel] | None:
    """The config class at a dotted place below `root`; None where there is a value or nothing."""
    current: type[BaseModel] | None = root
    for name in path:
        field = current.model_fields.get(name) if current else None
        current = _config_in(field.annotation) if field else None
    return current


def _config_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((found for part in typing.get_args(annotation) if (found := _config_in(part))), None)
    return None


def suggest(name: str, known: list[str]) -> str:
    """The nearest known name, and all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    question = f"did you mean {near[0]}? " if near else ""
    return f"{question}(known: {', '.join(known)})"


def _line(names: tuple[str, ...], problem: Any, root: type[BaseModel]) -> str:
    dotted = ".".join(names) or "recipe"
    value = problem.get("input")
    kind = problem["type"]
    if kind == "extra_forbidden":
        section = section_class(root, names[:-1])
        known = list(section.model_fields) if section else []
        if section is section_class(root, ("model",)):
            known = ["preset", *known]
        return f"  {dotted}: unknown; {suggest(names[-1], known)}"
    if kind == "missing":
        return f"  {dotted}: missing; add it to the recipe or give --{dotted}{_hint(root, names)}"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(value, dict | BaseModel):  # a rule over several fields, whose message names them
        return f"  {dotted}: {message}"
    return f"  {dotted}: {value!r} does not fit: {message}{_hint(root, names)}"


def _hint(root: type[BaseModel], names: tuple[str, ...]) -> str:
    for end in range(len(names), 0, -1):
        section = section_class(root, names[: end - 1])
        field = section.model_fields.get(names[end - 1]) if section else None
        if field and field.description:
            return f" ({' '.join(field.description.split())})"
    return ""
