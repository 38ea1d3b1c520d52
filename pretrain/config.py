"""A run as one readable file: the recipe, its overrides on the command line, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from model import ModelConfig
from parallel.bad_states import OnBadState
from parallel.boundary_states import Place
from parallel.config import ParallelConfig
from parallel.layout_rules import require_layout
from parallel.scoring import require_reset_window
from parallel.segments import Segments
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.data.config import DataConfig
from pretrain.errors import UserError
from pretrain.guards_config import GuardsConfig
from pretrain.optimizer import OptimizerConfig
from pretrain.quantities import Seed, Tokens
from pretrain.recipe_errors import explain
from pretrain.schedule import ScheduleConfig
from pretrain.strict_yaml import load_yaml


class TrainingConfig(BaseModel):
    """How much is learned from, in pieces of what size."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tokens: Tokens
    """Tokens to train on; the last step may go a part of a batch beyond."""

    sequence_length: Tokens
    """Tokens of a row: the memory starts anew at each, but with data.order streams."""

    batch_tokens: Tokens
    """Tokens of one optimizer step over all ranks; how many backward passes that takes on a rank is derived."""

    micro_batch_size: int = Field(default=1, ge=1)
    """Rows that a rank takes through one backward pass. It changes memory and speed, not what is learned."""

    segment_length: Tokens | None = None
    """Tokens that are run forward and backward at a time, the memory carried on: a divisor of sequence_length, so that
    a row takes the memory of a segment. None: rows are run whole. With parallel.zero_stage 2 or 3, which would keep a
    share of the gradients only, they wait whole for the step's one reduction (parallel.reduce_gradients)."""

    gradient: Literal["exact", "truncated"] = "exact"
    """How far gradients flow back through segments: exact, through the whole row, whatever segment_length is; or
    truncated, to where they stop every truncate_every segments."""

    truncate_every: int | None = Field(default=None, ge=1)
    """Segments that a truncated gradient flows through: it stops between them and those before."""

    boundary_states: Literal["auto", Place] = "auto"
    """Where the states between segments wait for the backward pass: on the device, in the host's memory, or on the
    disk of the run's folder. auto: the first of them where those of a micro-batch take no more than half of what is
    free there when the phase begins, weights, gradients, optimizer and activations set aside; what was chosen is
    printed, and in the events that begin a run and a phase. --dry-run says how large they are. It changes speed
    and memory, not what is learned."""

    on_bad_state: OnBadState = "reset"
    """With data.order streams, what a row does whose carried state is not finite: reset, begin anew; rollback, go on
    from the state before the step that spoiled it, which takes the memory of a second state, or begin anew where there
    is none of the same document to go back to, or where it went back in the step before already. Other rows are not
    disturbed."""

    max_bad_steps: int = Field(default=3, ge=1)
    """Steps in a row whose loss or gradient is not finite that end the run, with a checkpoint; fewer are skipped,
    weights and optimizer left as they are. One can be a bad batch, a second what it left in
    the rows' states; a third says that it is neither."""

    @model_validator(mode="after")
    def _segments_fit(self) -> TrainingConfig:
        if self.segment_length is None:
            for name in ("gradient", "truncate_every", "boundary_states"):
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is {value}, but without segment_length rows are run whole: set it")
        elif self.sequence_length % self.segment_length:
            divisors = [n for n in range(1, self.sequence_length + 1) if self.sequence_length % n == 0]
            below = [n for n in divisors if n < self.segment_length][-1:]
            above = [n for n in divisors if n > self.segment_length][:1]
            raise ValueError(
                f"segment_length {self.segment_length} does not divide sequence_length {self.sequence_length}: "
                f"{' or '.join(map(str, below + above))} would"
            )
        return self

    @model_validator(mode="after")
    def _gradient_reaches_as_far_as_said(self) -> TrainingConfig:
        if self.gradient == "exact" and self.truncate_every is not None:
            raise ValueError(
                f"truncate_every is {self.truncate_every}, but gradient is exact: make it truncated, or remove "
                "truncate_every"
            )
        if self.gradient == "truncated" and self.truncate_every is None:
            raise ValueError(
                "gradient is truncated, but truncate_every is not set: give the number of segments that a gradient "
                "flows through"
            )
        if self.boundary_states in ("host", "disk") and 1 in (self.truncate_every, self.num_segments):
            raise ValueError(
                f"boundary_states is {self.boundary_states}, but gradients flow through one segment only, and no state "
                "waits for them: remove it"
            )
        return self

    @property
    def num_segments(self) -> int:
        """Segments of a row; 1 where rows are run whole."""
        return 1 if self.segment_length is None else self.sequence_length // self.segment_length


class EvaluationConfig(BaseModel):
    """Loss on held-out data during the run: the shards of data.validation, or drawn rows that training never sees. Rows
    of text are read across documents, whatever data.reset_memory says of training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    every_tokens: Tokens | None = None
    """Tokens between evaluations; none: only at the end."""

    tokens: Tokens | None = 1_000_000
    """How many held-out tokens are scored, from the first on; none: all. Of drawn rows, which hold tokens that are no
    answers too, as many as have these tokens."""

    context: Tokens | None = None
    """Tokens of a held-out row of text; none: training.sequence_length. Rows are read in pieces of segment_length, or
    sequence_length, so that memory does not grow with it, but for full attention, whose keys and values do."""

    by_position: bool = False
    """Also record the loss by position in the row, in buckets of 0..63, 64..127, 128..255 and so on: as curves
    evaluation/position/<first>-<last>/carried, and as `positions` events in run.jsonl."""

    reset_window: Tokens | None = None
    """With by_position, also the loss with the memory reset every so many tokens of the row, attention and convolutions
    going on, as curves .../reset: the difference is what the memory gives. A multiple of the model's chunk (mac:
    segment), below context. It doubles the time of an evaluation."""


class LoggingConfig(BaseModel):
    """What is written while the run goes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    every_steps: int = Field(default=10, ge=1)
    """Steps between records of loss, speed and gradient norm (TensorBoard, run.jsonl, the progress line)."""

    memory_every_steps: int = Field(default=50, ge=1)
    """Steps between records of each layer's memory gates, surprise and weight norm: a multiple of every_steps."""

    @model_validator(mode="after")
    def _memory_records_are_among_the_records(self) -> LoggingConfig:
        if "memory_every_steps" in self.model_fields_set and self.memory_every_steps % self.every_steps:
            raise ValueError(
                f"memory_every_steps {self.memory_every_steps} is not a multiple of every_steps {self.every_steps}"
            )
        return self

    @property
    def memory_interval(self) -> int:
        """memory_every_steps, brought up to a multiple of every_steps where only the default does not fit."""
        return -(-self.memory_every_steps // self.every_steps) * self.every_steps


class Batches(BaseModel):
    """The division of a step, derived from the recipe and the number of ranks."""

    model_config = ConfigDict(frozen=True)

    rows: int
    accumulation: int
    steps: int
    total_tokens: int


class Recipe(BaseModel):
    """Everything about a run. Every field can be set as `--section.field value` too."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    name: Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]
    """What the run is called in its logs."""

    folder: Path
    """Where checkpoints, TensorBoard logs and run.jsonl go."""

    seed: Seed = 0
    """Seed of the initial weights, and of the data's order or draws unless data.seed says otherwise. In the phases
    behind the first the data's seed is raised by one each, past those that phases set themselves, so that no phase
    repeats another's order unasked."""

    initialize_from: Path | None = None
    """Where the initial weights come from instead of being drawn: an exported model or a checkpoint, of any layout, of
    the same model (model.rope_base may differ) and tokenizer. The optimizer and the step numbers begin anew. Once the
    run has a checkpoint it goes on from that."""

    start_phase: str | None = None
    """Name of the phase to begin with, from the weights of initialize_from: the phases before it are left out, as what
    those weights have behind them. None: the first phase. It stays the same for all of a run."""

    model: ModelConfig
    """The model: `preset` (such as mac-340m) and any field to change."""

    data: DataConfig
    """What is learned from: `kind` shards (tokenised text, the default) or synthetic (rows drawn for a task)."""

    training: TrainingConfig
    """Tokens and batch."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate."""

    parallel: ParallelConfig = ParallelConfig()
    """Ranks, devices, precision."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation; rows of text are read across documents."""

    logging: LoggingConfig = LoggingConfig()
    """Logs."""

    guards: GuardsConfig = GuardsConfig()
    """Spikes, stragglers, and checks before the first step."""

    @model_validator(mode="after")
    def _a_later_phase_has_weights(self) -> Recipe:
        if self.start_phase is not None and self.initialize_from is None:
            raise ValueError(
                f"start_phase is {self.start_phase}, but nothing says which weights it goes on from: set "
                "initialize_from to an exported model or a checkpoint, or remove start_phase"
            )
        return self

    @model_validator(mode="after")
    def _phases_of_the_schedule_fit(self) -> Recipe:
        warmup, decay = self.schedule.warmup_tokens, self.schedule.decay_tokens or 0
        if warmup + decay > self.training.tokens:
            parts = f"schedule.warmup_tokens {warmup}" + (f" and schedule.decay_tokens {decay}" if decay else "")
            raise ValueError(f"{parts} exceed training.tokens {self.training.tokens}: shorten them, or train longer")
        return self

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> Recipe:
        if self.evaluation.every_tokens is not None and not self.data.has_held_out:
            raise ValueError("evaluation.every_tokens is set but data.validation is not: name the held-out shards")
        if self.evaluation.tokens != EvaluationConfig().tokens and not self.data.has_held_out:
            raise ValueError(
                "evaluation.tokens is set but data.validation is not: name the held-out shards, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _rows_that_go_back_carry_a_state(self) -> Recipe:
        way = self.training.on_bad_state
        if way != "reset" and not self.data.carries_state:
            raise ValueError(
                f"training.on_bad_state is {way}, but no row carries a state into the next step, as with data.order "
                "streams: remove it"
            )
        return self

    @model_validator(mode="after")
    def _long_evaluation_fits(self) -> Recipe:
        evaluation = self.evaluation
        for name in ("context", "by_position", "reset_window"):
            if getattr(evaluation, name) and not self.data.has_held_out:
                raise ValueError(f"evaluation.{name} is set but data.validation is not: name the held-out shards")
        if evaluation.context is not None and self.data.kind == "synthetic":
            raise ValueError(
                f"evaluation.context is {evaluation.context}, but drawn rows are as long as data.task makes them: "
                "remove it"
            )
        if evaluation.context is not None and evaluation.tokens is not None and evaluation.tokens < evaluation.context:
            raise ValueError(
                f"evaluation.tokens {evaluation.tokens} is less than one row of evaluation.context "
                f"{evaluation.context}: raise it to {evaluation.context}"
            )
        if evaluation.reset_window is not None:
            if not evaluation.by_position:
                raise ValueError("evaluation.reset_window is set, but by_position is not: set it to true")
            context = evaluation.context or self.training.sequence_length
            require_reset_window(self.model, evaluation.reset_window, context, "evaluation.reset_window")
        return self

    @model_validator(mode="after")
    def _layout_fits(self) -> Recipe:
        training = self.training
        lengths = {"training.sequence_length": training.sequence_length}
        if training.segment_length is not None:
            lengths["training.segment_length"] = training.segment_length
        if self.evaluation.reset_window is not None:
            lengths["evaluation.reset_window"] = self.evaluation.reset_window
        require_layout(self.parallel, self.model, lengths=lengths)
        return self

    @model_validator(mode="after")
    def _attention_is_there_to_compute(self) -> Recipe:
        backend = self.parallel.attention_backend
        if backend != "auto" and not self.model.has_attention:
            raise ValueError(
                f"parallel.attention_backend is {backend}, but model.variant {self.model.variant} has no attention: "
                "remove it"
            )
        return self

    @model_validator(mode="after")
    def _memory_is_there_to_compute(self) -> Recipe:
        backend = self.parallel.memory_backend
        if backend != "auto" and self.model.memory is None:
            raise ValueError(
                f"parallel.memory_backend is {backend}, but model.variant {self.model.variant} has no memory: remove it"
            )
        return self

    @model_validator(mode="after")
    def _data_fits(self) -> Recipe:
        self.data.check_fits(
            sequence_length=self.training.sequence_length,
            vocab_size=self.model.vocab_size,
            held_out_tokens=self.evaluation.tokens,
        )
        training = self.training
        self.data.check_resets(
            self.model, sequence_length=training.sequence_length, segment_length=training.segment_length
        )
        return self

    def data_seed(self) -> int:
        """The seed of the data's order, or of its draws."""
        return self.seed if self.data.seed is None else self.data.seed

    def segments(self, boundary_states: Place) -> Segments | None:
        """How the engine cuts rows; None: it runs them whole.

        Args:
            boundary_states: where those between segments wait; see `pretrain.boundary_place`.
        """
        training = self.training
        if training.segment_length is None:
            return None
        return Segments(
            length=training.segment_length,
            count=training.num_segments,
            truncate_every=training.truncate_every,
            boundary_states=boundary_states,
            folder=self.folder,
        )

    def batches(self, ranks: int) -> Batches:
        """How a step is divided over `ranks`.

        Raises:
            UserError: the ranks are no multiple of those of parallel's other axes; batch_tokens is not a whole number
                of rounds of micro-batches, and the message has sizes that are.
        """
        training = self.training
        try:
            data_ranks = self.parallel.layout(ranks).data
        except ValueError as error:
            raise UserError(str(error)) from error
        rounds = training.sequence_length * training.micro_batch_size * data_ranks
        if training.batch_tokens % rounds:
            below = training.batch_tokens // rounds * rounds
            fitting = f"{below} or {below + rounds}" if below else f"{rounds}"
            kind = "" if data_ranks == ranks else "data-parallel "
            raise UserError(
                f"training.batch_tokens {training.batch_tokens} is not a multiple of training.sequence_length "
                f"{training.sequence_length} x training.micro_batch_size {training.micro_batch_size} x {data_ranks} "
                f"{kind}rank{'s' if data_ranks > 1 else ''} = {rounds} tokens; {fitting} would fit, or another "
                "micro_batch_size"
            )
        steps = -(-training.tokens // training.batch_tokens)
        return Batches(
            rows=training.batch_tokens // training.sequence_length,
            accumulation=training.batch_tokens // rounds,
            steps=steps,
            total_tokens=steps * training.batch_tokens,
        )

    def to_yaml(self) -> str:
        """The recipe with every default and preset written out; loading it gives the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe without phases and put the overrides (dotted name, text) over it.

    Raises:
        UserError: no such file, no YAML, an unknown name (with the nearest known one), or a value that does not fit;
            all that is wrong is listed at once. A recipe that lists phases.
    """
    raw = read_recipe_file(path)
    if raw.get("phases") is not None:
        raise UserError(f"recipe {path}: lists phases, and what reads it here takes a run of one: remove phases")
    for name, text in overrides:
        put_override(raw, name, text)
    if raw.get("start_phase") is not None:
        raise UserError(f"recipe {path}: start_phase is {raw['start_phase']}, but it lists no phases: remove it")
    raw.pop("phases", None)
    apply_preset(raw)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"recipe {path}:\n{explain(error, Recipe)}") from None


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """The sections of a recipe's file as they stand there. Raises UserError: no such file, or no YAML of sections."""
    path = Path(path)
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror or error}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} cannot be read as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path}: expected sections such as `model:` and `training:`, found {raw!r:.60}")
    return raw


def put_override(raw: dict[str, Any], name: str, text: str) -> None:
    """Set the field of a dotted name to what the text says as YAML. Raises UserError where there can be no such field,
    or the text is no YAML.
    """
    *sections, field = name.split(".")
    place = raw
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise UserError(f"--{name}: {section} is a value, not a section")
    place[field] = parse_override(name, text)


def parse_override(name: str, text: str) -> Any:
    """What an override's text says as YAML. Raises UserError where it is none."""
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--{name} {text}: not a value that YAML can read; quote it") from error


def apply_preset(raw: dict[str, Any]) -> None:
    """Replace `model.preset` by its fields, under those that the section changes. Raises UserError for an unknown
    preset.
    """
    section = raw.get("model")
    if not isinstance(section, dict) or "preset" not in section:
        return
    changes = {name: value for name, value in section.items() if name != "preset"}
    try:
        fields = ModelConfig.preset(section["preset"]).model_dump()
    except ValueError as error:
        raise UserError(f"model.{error}") from error
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            fields[name] = {**fields[name], **value}
        else:
            fields[name] = value
    raw["model"] = fields
