"""The command line of `python -m pretrain`: options, overrides of any field, and help written from the fields' own
docs.
"""

from __future__ import annotations

import argparse
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from model.presets import PRESETS
from pretrain.config import Recipe
from pretrain.errors import UserError
from pretrain.phases import FIELDS_OF_THE_RUN, MODEL_FIELDS, SECTIONS
from pretrain.quantities import parse_tokens
from pretrain.recipe_errors import kind_of, named_sections_in, sections_in, suggest

_DESCRIPTION = """Train a model as a recipe says.

Every field of the recipe can be set with --section.field VALUE (or --section.field=VALUE), VALUE being YAML:
--optimizer.lr 3e-4,
--model.preset mag-340m, --data.validation null. A field that is true or false is set to true without a VALUE. Numbers
of tokens may be written 15B, 0.5M or 4Ki. A run that was stopped goes on from its newest whole checkpoint when the same
command is given again.

A recipe may list phases, which are run one after another; --phases.NAME.section.field VALUE (or a number from 1
instead of the name) sets a field in one of them, --section.field VALUE in those that have no value of their own.

Exit codes: 0 done; 2 something in the recipe, the data or a checkpoint has to be mended first, or the loss did not
stay finite; 74 a disk is full or fails; 75 stopped by SIGUSR1 or SIGTERM to any rank, with a checkpoint behind the last
step, or an earlier one where that could not be written; 77 another copy of the run has taken its folder over; 124 a
step, an evaluation or a checkpoint took longer than parallel.step_timeout_seconds, or what stands before the first step
longer than parallel.startup_timeout_seconds; 1 a crash."""


_PHASES = f"""
phases: one after another on the same weights and optimizer. Each has
  --phases.NAME.name NAME
      Letters, digits, - and _, not digits alone.
and changes what it lists of these sections, for itself alone:
  --phases.NAME.SECTION.FIELD VALUE
      {{{"|".join(SECTIONS)}}}.FIELD but for
      {", ".join(f"{section}.{field}" for section, fields in FIELDS_OF_THE_RUN.items() for field in fields)}
{"".join(f"  --phases.NAME.model.{field} VALUE" for field in MODEL_FIELDS)}
Tokens, schedule and data begin anew with each phase; its last checkpoint is kept."""

_OPTIONS = ("help", "resume", "dry-run", "ranks", "preflight")


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    recipe: Path
    resume: str
    dry_run: bool
    preflight: bool
    ranks: int | None
    overrides: list[tuple[str, str]]


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line. Exits with help (0) or an error (2) as argparse does; raises UserError for a stray
    option.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pretrain",
        description=_DESCRIPTION,
        epilog=fields_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the run's recipe (see launch/recipes)")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: the newest whole checkpoint of the run's folder, if it has any; never: start over, refused where "
        "there are checkpoints; PATH: this checkpoint (default: auto)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe, sizes, FLOPs and memory, and do nothing"
    )
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="look at all ranks and their machines as before a run (guards.preflight), say what was found, and do "
        "nothing else",
    )
    parser.add_argument("--ranks", type=int, help="with --dry-run: for how many ranks (default: as launched, or 1)")
    words, overrides = _split(sys.argv[1:] if arguments is None else arguments)
    known, stray = parser.parse_known_args(words)
    if stray:
        raise UserError(f"unexpected argument {stray[0]!r}: options are --section.field VALUE; see --help")
    if known.ranks is not None and not known.dry_run:
        raise UserError("--ranks belongs to --dry-run: how many ranks train is the launcher's to say")
    if known.ranks is not None and known.ranks < 1:
        raise UserError(f"--ranks {known.ranks}: give a number above 0")
    if known.preflight and known.dry_run:
        raise UserError("--preflight starts all ranks and --dry-run none: give one of them")
    return Options(known.recipe, known.resume, known.dry_run, known.preflight, known.ranks, overrides)


def overrides_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """The overrides that words of a command line are: `--section.field VALUE`. Raises UserError for anything else."""
    stray, overrides = _split(words)
    if stray:
        raise UserError(f"unexpected argument {stray[0]!r}: options are --section.field VALUE; see --help")
    return overrides


def _split(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The words for argparse, and the overrides with their values, wherever among them they stand."""
    own: list[str] = []
    pairs: list[tuple[str, str]] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name or name in _OPTIONS:
            own.append(word)
            continue
        if "." not in name and name not in (*Recipe.model_fields, "phases"):
            raise UserError(f"--{name}: unknown; {suggest(name, [*_OPTIONS, *Recipe.model_fields, 'phases'])}")
        if not equals:
            has_value = bool(words) and not (words[0].startswith("--") and len(words[0]) > 2)
            if _is_switch(name) and (not has_value or words[0].endswith((".yaml", ".yml"))):
                value = "true"
            elif has_value:
                value = words.pop(0)
            else:
                raise UserError(f"{word} has no value: give --{name} VALUE")
        pairs.append((name, value))
    return own, pairs


def _is_switch(name: str) -> bool:
    """Whether a dotted name is that of a field that is true or false."""
    parts = name.split(".")
    sections: list[type[BaseModel]] = [Recipe]
    fields: list[FieldInfo] = []
    for part in parts[2:] if parts[0] == "phases" else parts:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = [section for field in fields for section in sections_in(field.annotation)]
    return bool(fields) and all(field.annotation is bool for field in fields)


def fields_help() -> str:
    """Each field of the recipe: its name, what it takes, its default, and its docstring; then what phases are."""
    lines = ["recipe fields:"]
    _add_fields(Recipe, "", lines)
    return "\n".join([*lines, _PHASES])


def _add_fields(section: type[BaseModel], prefix: str, lines: list[str]) -> None:
    for name, field in section.model_fields.items():
        choices = sections_in(field.annotation)
        text = " ".join((field.description or "").split())
        if entries := named_sections_in(field.annotation):
            lines.append(f"  --{prefix}{name}.NAME.FIELD VALUE\n      {text} Each NAME has:")
            _add_fields(entries, f"{prefix}{name}.NAME.", lines)
            continue
        if not choices:
            lines.append(f"  --{prefix}{name} {_kind(field)}{_default(field)}")
            lines.append(f"      {text}")
            continue
        lines.append(f"\n{prefix}{name}: {text}")
        if choices[0].__name__ == "ModelConfig":
            families, sizes = (dict.fromkeys(part) for part in zip(*(p.split("-") for p in PRESETS), strict=True))
            lines.append(f"  --model.preset NAME\n      {{{'|'.join(families)}}}-{{{'|'.join(sizes)}}}")
        for choice in choices:
            if len(choices) > 1:
                lines.append(f"\n{prefix}{name} of kind {kind_of(choice)}:")
            _add_fields(choice, f"{prefix}{name}.", lines)


def _kind(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    if parse_tokens.__name__ in f"{field.metadata} {annotation}":
        if typing.get_origin(annotation) is tuple:
            return "TOKENS | [TOKENS, TOKENS]"
        return "TOKENS | none" if type(None) in typing.get_args(annotation) else "TOKENS"
    return _type_name(annotation)


def _type_name(annotation: Any) -> str:
    parts = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type_name(parts[0])
    if origin is typing.Literal:
        return "|".join(str(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(part) for part in parts)
    if origin is tuple:
        return f"[{', '.join(_type_name(part) for part in parts)}]"
    return "none" if annotation is type(None) else annotation.__name__.upper()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "  (required)"
    if len(typing.get_args(field.annotation)) == 1:  # a kind that chooses its section is nobody's default
        return ""
    return f"  (default: {'none' if field.default is None else field.default})"
