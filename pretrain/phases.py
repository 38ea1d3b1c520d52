"""The phases of a run: recipes that follow each other on the same weights and optimizer, in one folder.

A recipe's file may list `phases`, each with a name and the fields that differ in it from the sections outside the list.
Every phase is a whole `Recipe`; a file without the list is a run of one phase.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pretrain.config import Batches, Recipe, apply_preset, parse_override, put_override, read_recipe_file
from pretrain.errors import UserError
from pretrain.recipe_errors import explain, suggest

ONLY_PHASE = "main"
"""Name of the phase of a run that lists none."""

SECTIONS = ("training", "optimizer", "schedule", "data", "parallel", "checkpoint", "evaluation", "logging", "guards")
"""Sections that a phase may change."""

MODEL_FIELDS = ("rope_base",)
"""Fields of the model that a phase may change: the rotary phases are computed from positions, so another base leaves
every parameter's shape and use as it is, and a larger one is how full attention is made ready for longer rows. Any
other field decides which parameters there are or what they stand for (memory.chunk, segment and window too: they are
what the weights were trained with)."""

FIELDS_OF_THE_RUN = {
    "parallel": ("device", "timeout_minutes", "startup_timeout_seconds", "deterministic"),
    "guards": ("preflight", "preflight_megabytes", "min_bandwidth", "clock_tolerance_seconds"),
    "checkpoint": ("staging", "upload", "upload_keep", "upload_wait_seconds", "upload_end_wait_seconds"),
}
"""Fields of those sections that hold for the whole run: its processes are started once."""

_NAME = re.compile(r"[A-Za-z0-9_-]*[A-Za-z_-][A-Za-z0-9_-]*")
_SEEDS = 2**63


@dataclass(frozen=True)
class Phase:
    """One phase: where it stands in its run, and its whole recipe."""

    number: int
    """From 1."""

    of: int
    """How many phases the run has."""

    name: str
    """As the recipe says it; `ONLY_PHASE` where it lists none."""

    recipe: Recipe
    """Every section as it holds in this phase."""

    @property
    def is_last(self) -> bool:
        """Whether the run ends with it."""
        return self.number == self.of

    @property
    def title(self) -> str:
        """The phase as messages say it."""
        return f"phase {self.name} ({self.number} of {self.of})"

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """UserErrors raised inside say which phase they belong to, where there are several."""
        try:
            yield
        except UserError as error:
            if self.of == 1:
                raise
            raise UserError(f"{self.title}: {error}") from error

    def batches(self, ranks: int) -> Batches:
        """See `Recipe.batches`."""
        with self.named_in_errors():
            return self.recipe.batches(ranks)


@dataclass(frozen=True)
class Phases:
    """The phases of a run in order; at least one."""

    phases: tuple[Phase, ...]

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.phases)

    def __len__(self) -> int:
        return len(self.phases)

    def __getitem__(self, index: int) -> Phase:
        return self.phases[index]

    @classmethod
    def alone(cls, recipe: Recipe) -> Phases:
        """A run of one phase."""
        return cls((Phase(1, 1, ONLY_PHASE, recipe),))

    @property
    def run(self) -> Recipe:
        """The recipe to ask for what all phases have in common: name, folder, seed, initialize_from, the model's
        parameters, the device.
        """
        return self.phases[0].recipe

    def require_fit(self, ranks: int) -> None:
        """Raises UserError with every phase whose steps do not divide over `ranks` (see `Recipe.batches`)."""
        found = []
        for phase in self:
            try:
                phase.batches(ranks)
            except UserError as error:
                found.append(str(error))
        if found:
            raise UserError("\n".join(found))

    def to_yaml(self) -> str:
        """The run with every default and preset written out; loading it gives the same phases."""
        return yaml.safe_dump(self.fields(), sort_keys=False)

    def fields(self) -> dict[str, Any]:
        """What `to_yaml` writes, in types that JSON has too."""
        common = self.run.model_dump(mode="json")
        if len(self) == 1 and self[0].name == ONLY_PHASE:
            return common
        listed: list[dict[str, Any]] = [{"name": self[0].name}]
        for phase in self.phases[1:]:
            fields = phase.recipe.model_dump(mode="json")
            entry = {"name": phase.name, **_changes(common, fields)}
            # Never left to the default, which is another seed in each phase.
            entry["data"] = {**entry.get("data", {}), "seed": fields["data"]["seed"]}
            listed.append(entry)
        return {**common, "phases": listed}


def load_phases(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Phases:
    """Read a recipe and put the overrides over it: `section.field` over what stands outside the phases, and
    `phases.NUMBER.section.field` or `phases.NAME.section.field` over one phase.

    Raises:
        UserError: as `load_recipe` does, with all that is wrong in any phase; a phase that changes what it cannot; an
            override outside the phases that each of them has a value of its own for, or of a phase that start_phase
            leaves out; a start_phase that is not there.
    """
    raw = read_recipe_file(path)
    for name, text in overrides:
        if name.startswith("phases."):
            _put_in_phase(raw, name, text)
        else:
            put_override(raw, name, text)
    listed = raw.pop("phases", None)
    apply_preset(raw)
    if listed is None:
        listed = [{"name": ONLY_PHASE}]
    elif not isinstance(listed, list) or not listed:
        raise UserError(f"recipe {path}: phases: list at least one, each with a name, or remove it")
    names, changes, problems = _read_phases(listed)
    first = _first_phase(raw, names, problems)
    for name, text in overrides:
        problems += _without_effect(raw, changes[first:], names[:first], name, text)
    # Those before the first count: the seeds of their data are not used again.
    recipes, wrong = _validated(names, _resolved(raw, changes))
    if problems or wrong:
        raise UserError("\n".join([f"recipe {path}:", *problems, *wrong]))
    kept = list(zip(names, recipes, strict=True))[first:]
    return Phases(tuple(Phase(number, len(kept), name, recipe) for number, (name, recipe) in enumerate(kept, start=1)))


def _first_phase(raw: dict[str, Any], names: list[str], problems: list[str]) -> int:
    """The index of start_phase, 0 where there is none."""
    start = raw.get("start_phase")
    if not isinstance(start, str):  # anything else but null is refused as it stands
        return 0
    if start not in names:
        problems.append(f"  start_phase: there is no phase {start}: {suggest(start, names)}")
        return 0
    return names.index(start)


def _put_in_phase(raw: dict[str, Any], name: str, text: str) -> None:
    _, which, *fields = name.split(".")
    listed = raw.get("phases")
    if not isinstance(listed, list):
        raise UserError(f"--{name}: the recipe lists no phases; give --{'.'.join(fields) or 'section.field'}")
    entries = {str(number): entry for number, entry in enumerate(listed, start=1)}
    names = {str(entry["name"]): entry for entry in listed if isinstance(entry, dict) and "name" in entry}
    entry = entries.get(which, names.get(which))
    if entry is None:
        raise UserError(f"--{name}: there is no phase {which}: {suggest(which, [*names])}, or a number from 1")
    if not isinstance(entry, dict) or not fields:
        raise UserError(f"--{name}: give a field of the phase, such as --phases.{which}.training.tokens")
    try:
        put_override(entry, ".".join(fields), text)
    except UserError as error:
        raise UserError(f"--phases.{which}: {error}") from error


def _read_phases(listed: list[Any]) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    """The phases' names, what each changes, and what is wrong with either; what is wrong changes nothing."""
    names: list[str] = []
    changes: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, entry in enumerate(listed, start=1):
        if not isinstance(entry, dict):
            problems.append(f"  phases.{number}: expected a name and sections, found {entry!r:.60}")
            entry = {"name": f"phase-{number}"}
        name = entry.get("name")
        if name is None:
            problems.append(f"  phases.{number}: has no name; add one, such as 32k")
        elif not (isinstance(name, str) and _NAME.fullmatch(name)):
            problems.append(
                f"  phases.{number}: name {name!r} does not fit: letters, digits, - and _, and not digits alone, as "
                "numbers stand for places"
            )
        elif name in names:
            problems.append(f"  phases.{number}: a phase before is called {name} too; give each a name of its own")
        names.append(str(name))
        changes.append(_allowed(f"phases.{name or number}", entry, problems))
    return names, changes, problems


def _allowed(place: str, entry: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for section, value in entry.items():
        fields = value if isinstance(value, dict) else {}
        if section == "name":
            continue
        if section == "model" and isinstance(value, dict):
            problems += [
                f"  {place}.model.{field}: cannot change between phases: the parameters' shapes or meaning hang on it; "
                f"only {', '.join(MODEL_FIELDS)} can"
                for field in fields
                if field not in MODEL_FIELDS
            ]
            kept[section] = {field: fields[field] for field in MODEL_FIELDS if field in fields}
        elif section in SECTIONS:
            of_run = [field for field in fields if field in FIELDS_OF_THE_RUN.get(section, ())]
            problems += [
                f"  {place}.{section}.{field}: holds for the whole run; set it outside the phases" for field in of_run
            ]
            kept[section] = {f: v for f, v in fields.items() if f not in of_run} if fields else value
        elif section in Recipe.model_fields:
            problems.append(f"  {place}.{section}: holds for the whole run; set it outside the phases")
        else:
            problems.append(f"  {place}.{section}: unknown; {suggest(str(section), ['name', 'model', *SECTIONS])}")
    return kept


def _resolved(raw: dict[str, Any], changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sections of each phase, the seed of its data chosen, where it has none of its own, so that it does not repeat
    another phase's order.
    """
    listed = [_merged(copy.deepcopy(raw), change) for change in changes]
    own = [_at(change, ("data", "seed")) for change in changes]
    taken = {seed for seed in (_data_seed(listed[0]), *own) if isinstance(seed, int)}
    for index, fields in enumerate(listed):
        seed = _data_seed(fields)
        if index > 0 and own[index] is None and isinstance(fields.get("data"), dict) and isinstance(seed, int):
            if seed >= 0:  # anything else is refused as it stands
                seed = (seed + index) % _SEEDS
                while seed in taken:
                    seed = (seed + 1) % _SEEDS
            taken.add(seed)
            fields["data"] = {**fields["data"], "seed": seed}
    return listed


def _data_seed(fields: dict[str, Any]) -> Any:
    """As `Recipe.data_seed`, of sections that nobody has looked at yet."""
    own = _at(fields, ("data", "seed"))
    return fields.get("seed", 0) if own is None else own


def _merged(base: Any, changes: Any, *, by_kind: bool = False) -> Any:
    """`base` with the fields of `changes`; data of another kind stands alone, as it has other fields."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    if by_kind and "kind" in changes and changes["kind"] != base.get("kind", "shards"):
        return changes
    merged = dict(base)
    for name, value in changes.items():
        merged[name] = _merged(base[name], value, by_kind=by_kind or name == "data") if name in base else value
    return merged


def _changes(base: Any, fields: Any) -> dict[str, Any]:
    """What `_merged` makes `fields` from `base` with."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        before = base.get(name)
        if value == before:
            continue
        sections = isinstance(value, dict) and isinstance(before, dict)
        # What a section holds may depend on its kind (data's, not the schedule's); such a one is written whole.
        if sections and (name == "schedule" or value.get("kind") == before.get("kind")):
            found[name] = _changes(before, value)
        else:
            found[name] = value
    return found


def _without_effect(
    raw: dict[str, Any], changes: list[dict[str, Any]], left_out: list[str], name: str, text: str
) -> list[str]:
    """An override outside the phases that each of them puts a value of its own over, and one of a phase left out."""
    section, *inside = name.split(".")
    if section == "phases":
        numbers = [str(number) for number in range(1, len(left_out) + 1)]
        unused = inside and inside[0] in (*left_out, *numbers)
        return [f"  --{name}: has no effect, as start_phase leaves that phase out; drop it"] if unused else []
    found = []
    for leaf in _leaves(tuple(name.split(".")), parse_override(name, text)):
        mark = object()
        marked = _merged(raw, _nested(leaf, mark))
        if all(_at(_merged(marked, change), leaf) is not mark for change in changes):
            dotted = ".".join(leaf)
            found.append(
                f"  --{dotted}: has no effect, as every phase sets {dotted} itself; give --phases.NAME.{dotted}"
            )
    return found


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves((*path, str(name)), inner)
    else:
        yield path


def _nested(path: tuple[str, ...], value: Any) -> Any:
    for name in reversed(path):
        value = {name: value}
    return value


def _at(fields: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        fields = fields.get(name) if isinstance(fields, dict) else None
    return fields


def _validated(names: list[str], resolved: list[dict[str, Any]]) -> tuple[list[Recipe], list[str]]:
    """The phases' recipes, and what is wrong: once where it is wrong in all of them, else with the phase's name."""
    recipes: list[Recipe] = []
    found: dict[str, list[str]] = {}
    for name, fields in zip(names, resolved, strict=True):
        try:
            recipes.append(Recipe.model_validate(fields))
        except ValidationError as error:
            for line in explain(error, Recipe).splitlines():
                found.setdefault(line, []).append(name)
    lines = []
    for line, where in found.items():
        everywhere = len(where) == len(names)
        lines += [line] if everywhere else [f"  phase {name}: {line.strip()}" for name in where]
    return recipes, lines
