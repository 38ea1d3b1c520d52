"""Validation errors in a user's words: the field by its dotted name, the value, and what to write instead."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line for each thing that is wrong."""
    return "\n".join(dict.fromkeys(_line(problem, root) for problem in error.errors(include_url=False)))


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


def _line(problem: Any, root: type[BaseModel]) -> str:
    names = tuple(str(part) for part in problem["loc"])
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
