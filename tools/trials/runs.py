"""The runs of a suite: their folders, what each holds, and how far it is.

A run's folder holds recipe.yaml, which `python -m launch local` trains too; trial.json, which says what the run is and
how it is probed; what the training writes; and at last result.json.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from model.flops import flops_per_token
from pretrain.checkpoints import CHECKPOINTS_FOLDER, checkpoint_step, list_checkpoints
from pretrain.config import Recipe
from pretrain.data import SyntheticConfig
from pretrain.errors import UserError
from tools.bench.record import environment
from tools.trials.results import RESULT_FILE, Result, read_result, replace_text, run_folder
from tools.trials.suite import Probe, Study, Suite, Trial

RECIPE_FILE = "recipe.yaml"
TRIAL_FILE = "trial.json"

State = Literal["done", "diverged", "trained", "started", "to do", "of another recipe"]


class TrialFile(BaseModel):
    """The content of trial.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    study: str
    """The study's name."""

    trial: str
    """The trial's name."""

    seed: int
    """The run's seed."""

    metric: Literal["accuracy", "loss"]
    """The study's metric."""

    text: str | None
    """Fingerprint of the text of a study that needs one."""

    recipe_sha256: str
    """What the result will be of: see `identity`."""

    parameters: int
    """Of the model."""

    chance: float | None
    """Share of right answers that guessing gets; None for shards."""

    probes: dict[str, Probe]
    """By name, with every default filled in."""

    environment: dict[str, Any]
    """Of the training's start: commit, hardware and versions, as tools.bench.record tells them."""


@dataclass(frozen=True)
class Run:
    """One training and its probes. `text` is the fingerprint of the text that a study with `text` reads."""

    study: Study
    trial: Trial
    seed: int
    output: Path
    text: str | None = None

    @property
    def name(self) -> str:
        """`study/trial/seed-n`, as the folder is called."""
        return f"{self.path}/seed-{self.seed}"

    @property
    def path(self) -> str:
        """`study/trial`."""
        return f"{self.study.name}/{self.trial.name}"

    @property
    def folder(self) -> Path:
        """Where everything of the run is."""
        return run_folder(self.output, self.study.name, self.trial.name, self.seed)

    @property
    def recipe(self) -> Recipe:
        """What is trained, with name, folder and seed."""
        return self.trial.recipe.model_copy(update={"name": self.name, "folder": self.folder, "seed": self.seed})

    @property
    def steps(self) -> int:
        """Optimizer steps of the training."""
        return self.recipe.batches(1).steps

    @property
    def work(self) -> float:
        """FLOPs of the training: how long it takes beside others, roughly."""
        training = self.trial.recipe.training
        return flops_per_token(self.trial.recipe.model, training.sequence_length).total * training.tokens

    def identity(self) -> str:
        """sha256 over what the result depends on: the recipe wherever it lies, the text, the metric and the probes. Of
        shards that are not the command's own, the folder stands for what is in them.
        """
        probes = {name: probe.model_dump(mode="json") for name, probe in self.study.probes.items()}
        content = {"recipe": self._comparable(self.recipe.model_dump(mode="json")), "probes": probes, "text": self.text}
        content["metric"] = self.study.config.metric
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def state(self) -> State:
        """How far the run is. Raises UserError for files in its folder that cannot be read."""
        if (self.folder / RESULT_FILE).exists():
            result = read_result(self.folder / RESULT_FILE)
            if result.recipe_sha256 == self.identity():
                return "done" if result.failed is None else "diverged"
        if not (self.folder / RECIPE_FILE).exists():
            left = (self.folder / RESULT_FILE).exists() or self._checkpoints()
            return "of another recipe" if left else "to do"
        if not self._same_training():
            return "of another recipe"
        return "trained" if self.is_trained() else "started"

    def is_trained(self) -> bool:
        """Whether the checkpoint of the last step is there."""
        return self.steps in (checkpoint_step(checkpoint) for checkpoint in self._checkpoints())

    def result(self) -> Result:
        """The result of a run that is done. Raises UserError where it cannot be read."""
        return read_result(self.folder / RESULT_FILE)

    def prepare(self) -> None:
        """Writes what the training and the probes read. Raises UserError where it cannot be written."""
        data = self.trial.recipe.data
        begun = bool(self._checkpoints()) and (self.folder / TRIAL_FILE).exists()
        file = TrialFile(
            study=self.study.name,
            trial=self.trial.name,
            seed=self.seed,
            metric=self.study.config.metric,
            text=self.text,
            recipe_sha256=self.identity(),
            parameters=self.trial.parameters,
            chance=data.task.chance if isinstance(data, SyntheticConfig) else None,
            probes=dict(self.study.probes),
            environment=read_trial_file(self.folder).environment if begun else environment(),
        )
        # The recipe last: a folder that has one has both, and may hold a started training.
        replace_text(self.folder / TRIAL_FILE, file.model_dump_json(indent=1) + "\n")
        replace_text(self.folder / RECIPE_FILE, self.recipe.to_yaml())

    def remove(self) -> None:
        """Removes the run's folder. Raises UserError where that fails."""
        leaving = self.folder.with_name(f".{self.folder.name}.removed")
        try:
            if leaving.exists():  # left by a call that was killed
                shutil.rmtree(leaving)
            self.folder.replace(leaving)  # first: half a folder could be taken for a run of the new recipe
            shutil.rmtree(leaving)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be removed: {error.strerror}") from error

    def _checkpoints(self) -> list[Path]:
        return list_checkpoints(self.folder / CHECKPOINTS_FOLDER)

    def _comparable(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe's fields without the places of its files, where their content is known otherwise."""
        fields = {name: value for name, value in recipe.items() if name != "folder"}
        if self.study.config.text:
            fields["data"] = {k: v for k, v in fields["data"].items() if k not in ("train", "validation")}
        return fields

    def _same_training(self) -> bool:
        """Whether the recipe and the text in the folder are the run's; the probes may be others."""
        try:
            found = yaml.safe_load((self.folder / RECIPE_FILE).read_text(encoding="utf-8"))
            text = read_trial_file(self.folder).text
            same = self._comparable(found) == self._comparable(self.recipe.model_dump(mode="json"))
        except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError) as error:
            raise UserError(
                f"{self.folder / RECIPE_FILE}: cannot be read ({error}); remove {self.folder} to run it anew"
            ) from error
        return same and text == self.text


def read_trial_file(folder: Path) -> TrialFile:
    """What the run in a folder is. Raises UserError where that cannot be read."""
    path = folder / TRIAL_FILE
    try:
        return TrialFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; remove {folder} to run it anew") from error


def runs_of(suite: Suite, output: Path, *, seeds: int | None = None) -> list[Run]:
    """All runs in the order in which they are to be done: the first seed of everything, then the next; among the runs
    of a seed the longest first, so that no long one is left for the end. `seeds`: only the first so many of a study.
    """
    numbered = [
        (number, Run(study, trial, seed, output))
        for study in suite.studies
        for trial in study.trials
        for number, seed in enumerate(study.config.seeds[:seeds])
    ]
    return [run for _, run in sorted(numbered, key=lambda pair: (pair[0], -pair[1].work))]


def with_text(run: Run, fingerprint: str | None) -> Run:
    """The run, knowing the text that it reads if its study has one."""
    return replace(run, text=fingerprint) if run.study.config.text else run
