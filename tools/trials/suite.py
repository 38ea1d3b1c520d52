"""The suite file: studies, each of which compares trials; and everything that is wrong with one, at once.

    studies:
      variants:
        title: Recall at sixteen windows
        recipe: recall.yaml
        seeds: [0, 1, 2]
        probes:
          as trained: {}
          16 windows: {task: {filler: 256}}
        metric: accuracy
        trials:
          lmm: {model.preset: lmm-tiny}
          mac: {model.preset: mac-tiny, model.segment: 16}

A trial is changes over the study's recipe, dotted names to values, as the options of `python -m pretrain` are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pretrain.config import Recipe, load_recipe
from pretrain.data import SyntheticConfig
from pretrain.errors import UserError
from pretrain.plan import num_parameters
from pretrain.quantities import Seed, Tokens
from pretrain.recipe_errors import explain, suggest
from pretrain.strict_yaml import load_yaml

FOLDER_NAME = re.compile(r"[a-z0-9][a-z0-9_.+-]*")
SET_BY_THE_COMMAND = ("name", "folder", "seed")
SET_FOR_TEXT = ("data.kind", "data.train", "data.validation")
SAME_IN_A_STUDY = ("tokens", "batch_tokens", "sequence_length")


class TextSizes(BaseModel):
    """How much of the text that the user names is read, and into how many different tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    vocab_size: int = Field(default=1024, ge=300)
    """Tokens of the tokenizer that is trained on the training text."""

    train_bytes: Tokens
    """UTF-8 bytes of training text."""

    validation_bytes: Tokens
    """UTF-8 bytes of held-out text."""


class Probe(BaseModel):
    """Held-out rows that a trained model is scored on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: dict[str, Any] | None = None
    """Of drawn rows: fields of the task that differ from the training's."""

    rows: int | None = Field(default=None, ge=1)
    """Of drawn rows: how many (256 where none is given)."""

    context: Tokens | None = None
    """Of shards: tokens of a row; the training length where none is given."""

    tokens: Tokens | None = None
    """Of shards: how many are scored, from the first held-out one on (65536 where none is given)."""


class StudyConfig(BaseModel):
    """A question, and the trials whose results answer it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    title: str = Field(min_length=1)
    """What the study asks, in a line."""

    recipe: Path
    """The recipe that all trials begin from, relative to the suite file."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    """Seeds that every trial runs with."""

    changes: dict[str, Any] = {}
    """Changes over the recipe for all trials: dotted names to values."""

    same_parameters: float | None = Field(default=None, ge=0)
    """How much larger, as a share, the largest model may be than the smallest; none: any."""

    beside: tuple[str, ...] = ()
    """Trials of other studies, `study/trial`, to show first in the table and the plots: they must have been trained and
    probed as this study's are, such as the baseline of several studies."""

    text: bool = False
    """Whether the data is the text that the user names with --text: the recipe need not name shards then."""

    probes: Annotated[dict[str, Annotated[Probe, BeforeValidator(lambda value: value or {})]], Field(min_length=1)]
    """After the training, each on the last checkpoint, by name."""

    metric: Literal["accuracy", "loss"]
    """What is compared: of the probes, and drawn over the steps."""

    trials: Annotated[
        dict[str, Annotated[dict[str, Any], BeforeValidator(lambda value: value or {})]], Field(min_length=1)
    ]
    """Changes over the recipe and the study's own, by the trial's name."""


class SuiteConfig(BaseModel):
    """The content of a suite file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    studies: Annotated[dict[str, StudyConfig], Field(min_length=1)]
    """By name, in the order of the report."""

    text: TextSizes | None = None
    """Sizes of the text of the studies that need one."""


@dataclass(frozen=True)
class Trial:
    """A trial ready to run: its recipe but for name, folder and seed, and its model's parameters."""

    name: str
    recipe: Recipe
    parameters: int


@dataclass(frozen=True)
class Study:
    """A study that is right in itself, and its probes with every default filled in."""

    name: str
    config: StudyConfig
    trials: tuple[Trial, ...]
    probes: Mapping[str, Probe]


@dataclass(frozen=True)
class Suite:
    """A suite file that was read and checked."""

    path: Path
    studies: tuple[Study, ...]
    text: TextSizes | None


def load_suite(path: Path, text_shards: tuple[Path, Path]) -> Suite:
    """Reads and checks a suite file.

    Args:
        text_shards: where the training and the held-out shards of the studies with `text` are, or will be.

    Raises:
        UserError: naming file, study, trial and field of all that is wrong.
    """
    config = _read(path)
    problems: list[str] = []
    studies = []
    for name, study in config.studies.items():
        found, wrong = _resolve(path, name, study, config.text, text_shards)
        studies.append(found)
        problems += [f"study {name}{text}" for text in wrong]
    for study in studies:
        problems += [f"study {study.name}: beside: {text}" for text in _not_beside(study, studies)]
    if problems:
        raise UserError(f"suite {path}:\n" + "\n".join(problems))
    return Suite(path, tuple(studies), config.text)


def _read(path: Path) -> SuiteConfig:
    """The file's content, right in its form."""
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
        return SuiteConfig.model_validate(raw)
    except OSError as error:
        raise UserError(f"suite {path}: {error.strerror or error}; give the path of a suite file") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"suite {path} cannot be read as YAML: {error}") from error
    except ValidationError as error:
        lines = "\n".join(_line(problem) for problem in error.errors(include_url=False))
        raise UserError(f"suite {path}:\n{lines}") from None


def _line(problem: Any) -> str:
    """A problem of the file's form: the field by its path, and what to do."""
    place = ".".join(str(part) for part in problem["loc"]) or "the file"
    if problem["type"] == "extra_forbidden":
        parents: dict[int, type[BaseModel]] = {1: SuiteConfig, 3: StudyConfig, 5: Probe}
        section = TextSizes if problem["loc"][0] == "text" else parents[len(problem["loc"])]
        return f"  {place}: unknown; {suggest(str(problem['loc'][-1]), list(section.model_fields))}"
    if problem["type"] == "missing":
        return f"  {place}: missing; add it"
    return f"  {place}: {problem['input']!r:.80} does not fit: {problem['msg']}"


def _resolve(
    path: Path, name: str, config: StudyConfig, sizes: TextSizes | None, text_shards: tuple[Path, Path]
) -> tuple[Study, list[str]]:
    """The study, and what is wrong with it; each problem begins with where in the study it is."""
    problems = [
        f": {kind} {text!r} is no name for a folder: use a-z, 0-9, and _ . + - after the first character"
        for kind, text in [("the name", name), *(("trial", trial) for trial in config.trials)]
        if not FOLDER_NAME.fullmatch(text)
    ]
    if repeated := [seed for seed, times in Counter(config.seeds).items() if times > 1]:
        problems.append(f": seeds: {repeated[0]} stands more than once; give different ones")
    if config.text and sizes is None:
        problems.append(": text is true, and the suite has no sizes of text: add `text: {train_bytes: ..., ...}`")
    shards = list(zip(SET_FOR_TEXT, ("shards", *map(str, text_shards)), strict=True)) if config.text else []
    trials = []
    for trial, changes in config.trials.items():
        try:
            recipe = _trial_recipe(path.parent / config.recipe, {**config.changes, **changes}, shards)
            recipe.batches(1)
            trials.append(Trial(trial, recipe, num_parameters(recipe.model)))
        except UserError as error:
            problems.append(f", trial {trial}: {error}")
    probes: dict[str, Probe] = {}
    if trials:
        problems += _differences(config, trials, sizes)
        for probe, fields in config.probes.items():
            try:
                probes[probe] = _resolved_probe(fields, trials)
            except UserError as error:
                problems.append(f", probe {probe}: {error}")
    return Study(name, config, tuple(trials), probes), problems


def _not_beside(study: Study, studies: list[Study]) -> list[str]:
    """What keeps the trials of other studies from being shown with the study's."""
    trials = {f"{other.name}/{trial.name}": (other, trial) for other in studies for trial in other.trials}
    problems = []
    for path in study.config.beside:
        if path not in trials:
            problems.append(f"there is no trial {path}; {suggest(path, list(trials))}")
            continue
        other, trial = trials[path]
        training = [getattr(one.recipe, part) for one in (trial, *study.trials[:1]) for part in ("training", "data")]
        if other is study or training[:2] != training[2:]:
            problems.append(f"{path} is not another study's, trained on the same data and tokens: remove it")
        elif any(other.probes.get(name) != probe for name, probe in study.probes.items()):
            problems.append(f"{path} has not all of this study's probes: make them the same, or remove it")
        elif not set(study.config.seeds) <= set(other.config.seeds):
            problems.append(f"{path} has not all of this study's seeds: make them the same, or remove it")
    return problems


def _trial_recipe(base: Path, changes: Mapping[str, Any], shards: list[tuple[str, str]]) -> Recipe:
    """The recipe with a trial's changes. Raises UserError."""
    own = [*SET_BY_THE_COMMAND, *(name for name, _ in shards)]
    if taken := [name for name in changes if name in own]:
        raise UserError(f"{taken[0]} is set by the command, for each run: remove it")
    overrides = [(name, yaml.safe_dump(value, default_flow_style=True)) for name, value in changes.items()]
    return load_recipe(base, [*overrides, *shards])


def _differences(config: StudyConfig, trials: list[Trial], sizes: TextSizes | None) -> list[str]:
    """What keeps the trials of a study from being compared."""
    problems = []
    first = trials[0]
    for field in SAME_IN_A_STUDY:
        values = {trial.name: getattr(trial.recipe.training, field) for trial in trials}
        if others := [name for name, value in values.items() if value != values[first.name]]:
            problems.append(
                f", trial {others[0]}: training.{field} is {values[others[0]]} and {first.name}'s is "
                f"{values[first.name]}: trials are compared at equal ones; put the change into the study's `changes`"
            )
    small, large = (choose(trials, key=lambda trial: trial.parameters) for choose in (min, max))
    more = (large.parameters - small.parameters) / small.parameters
    if config.same_parameters is not None and more > config.same_parameters:
        problems.append(
            f": same_parameters: {large.name} has {large.parameters:,} parameters, {100 * more:.1f} % more than "
            f"{small.name} with {small.parameters:,}; at most {100 * config.same_parameters:g} % are allowed: change a "
            "width, such as model.ffn_dim"
        )
    for trial in trials:
        drawn = isinstance(trial.recipe.data, SyntheticConfig)
        if not drawn and config.metric == "accuracy":
            problems.append(f", trial {trial.name}: metric accuracy needs data with answers; data.kind is shards: loss")
        if not trial.recipe.data.has_held_out:
            problems.append(f", trial {trial.name}: data.validation is missing: the probes read it")
        if config.text and sizes is not None and trial.recipe.model.vocab_size < sizes.vocab_size:
            problems.append(
                f", trial {trial.name}: model.vocab_size {trial.recipe.model.vocab_size} is smaller than "
                f"text.vocab_size {sizes.vocab_size}: raise it"
            )
    return problems


def _resolved_probe(probe: Probe, trials: list[Trial]) -> Probe:
    """The probe with its defaults, the same for every trial. Raises UserError where it does not fit one of them."""
    resolved = {_probe_of(probe, trial.recipe).model_dump_json(): trial.name for trial in trials}
    if len(resolved) > 1:
        raise UserError(
            f"comes to different rows for the trials {' and '.join(resolved.values())}: their data differ, so that "
            "their results cannot be compared; put the change into the study's `changes`"
        )
    return Probe.model_validate_json(next(iter(resolved)))


def _probe_of(probe: Probe, recipe: Recipe) -> Probe:
    """The probe for a recipe's data, with every default filled in."""
    data = recipe.data
    drawn = isinstance(data, SyntheticConfig)
    strange = ("context", "tokens") if drawn else ("task", "rows")
    if given := [name for name in strange if getattr(probe, name) is not None]:
        fitting = "task and rows" if drawn else "context and tokens"
        raise UserError(f"{given[0]} does not fit data.kind {data.kind}: give {fitting}")
    if not isinstance(data, SyntheticConfig):
        length = recipe.training.sequence_length
        return Probe(context=probe.context or length, tokens=probe.tokens or 65536)
    changes = probe.task or {}
    same_kind = changes.get("kind", data.task.kind) == data.task.kind
    fields = {**(data.task.model_dump(mode="json") if same_kind else {}), **changes}
    try:
        rows = SyntheticConfig.model_validate({"task": fields})
        rows.check_fits(sequence_length=rows.task.row_tokens, vocab_size=recipe.model.vocab_size, held_out_tokens=1)
        if rows.task.chance != data.task.chance:
            raise ValueError(
                f"task: guessing gets {100 * rows.task.chance:.2g} % right there and {100 * data.task.chance:.2g} % in "
                "training, so that they can't be drawn together: leave kind, and the number of answers, as they are"
            )
    except ValidationError as error:
        raise UserError(explain(error, SyntheticConfig).strip()) from None
    except ValueError as error:
        raise UserError(str(error)) from None
    return Probe(task=rows.task.model_dump(mode="json"), rows=probe.rows or 256)
