"""Validation errors in a user's words: the field by its dotted name, the value, and what to write instead."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

Place = tuple[tuple[str, ...], tuple[type[BaseModel] | None, ...]]
"""A field by its dotted name's parts, and the config class that each part is in."""


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line for each thing that is wrong."""
    problems: dict[Place, Any] = {}
    for problem in error.errors(include_url=False):
        place = _find(root, tuple(str(part) for part in problem["loc"]), problem["type"])
        if place in problems:  # the value fits none of several types
            problem["msg"] = f"{problems[place]['msg']}; or: {problem['msg']}"
        problems[place] = problem
    return "\n".join(_line(place, problem) for place, problem in problems.items())


def _find(root: type[BaseModel], location: tuple[str, ...], kind: str) -> Place:
    """A problem's place without what pydantic puts behind a field, such as the type of a union that it tried."""
    section: type[BaseModel] | None = root
    names: list[str] = []
    sections: list[type[BaseModel] | None] = []
    parts = iter(location)
    for name in parts:
        known = section is not None and name in section.model_fields
        # An element of a tuple is part of the place.
        if known or (section is None and name.isdigit()) or (section is not None and kind == "extra_forbidden"):
            names.append(name)
            sections.append(section)
        if section is None or not known:
            break
        annotation = section.model_fields[name].annotation
        choices = sections_in(annotation)
        if entries := named_sections_in(annotation):  # behind them stands the name that the recipe gave
            key = next(parts, None)
            if key is not None:
                names.append(key)
                sections.append(None)
            section = entries
        elif len(choices) > 1:  # behind a section of several kinds stands the kind that was chosen
            chosen = next(parts, None)
            section = next((choice for choice in choices if kind_of(choice) == chosen), None)
        else:
            section = choices[0] if choices else None
    return tuple(names), tuple(sections)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The config classes that a field of this type may hold: none for a value, several for a section of several
    kinds.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [found for part in typing.get_args(annotation) for found in sections_in(part)]
    return []


def named_sections_in(annotation: Any) -> type[BaseModel] | None:
    """The config class of the entries that a field of this type holds by names of the recipe's own; None for a field
    of another type.
    """
    if typing.get_origin(annotation) is not dict:
        return None
    return next(iter(sections_in(typing.get_args(annotation)[1])), None)


def kind_of(section: type[BaseModel]) -> str:
    """The `kind` that chooses this class among several."""
    return section.model_fields["kind"].default


def suggest(name: str, known: list[str]) -> str:
    """The nearest known name, and all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    question = f"did you mean {near[0]}? " if near else ""
    return f"{question}(known: {', '.join(known)})"


def _line(place: Place, problem: Any) -> str:
    names, sections = place
    dotted = ".".join(names) or "recipe"
    value = problem.get("input")
    kind = problem["type"]
    if kind == "extra_forbidden":
        section = sections[-1]
        known = list(section.model_fields) if section else []
        if names[:-1] == ("model",):
            known = ["preset", *known]
        return f"  {dotted}: unknown; {suggest(names[-1], known)}"
    if kind == "missing":
        return f"  {dotted}: missing; add it to the recipe or give --{dotted}{_hint(place)}"
    if kind in ("union_tag_invalid", "union_tag_not_found") and sections[-1] is not None:
        kinds = [kind_of(choice) for choice in sections_in(sections[-1].model_fields[names[-1]].annotation)]
        if kind == "union_tag_not_found":
            return f"  {dotted}.kind: missing; give --{dotted}.kind, one of: {', '.join(kinds)}"
        tag = problem["ctx"]["tag"]
        return f"  {dotted}.kind: {tag!r} does not fit: {suggest(tag, kinds)}"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(value, dict | BaseModel):  # a rule over several fields, whose message names them
        return f"  {dotted}: {message}"
    return f"  {dotted}: {value!r} does not fit: {message}{_hint(place)}"


def _hint(place: Place) -> str:
    for name, section in zip(*map(reversed, place), strict=True):
        field = section.model_fields.get(name) if section else None
        if field and field.description:
            return f" ({' '.join(field.description.split())})"
    return ""
