"""What a run would be, without running it: sizes, arithmetic, and an estimate of the memory of each rank."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product

from model import ModelConfig, TitansLM
from model.flops import flops_per_token
from model.language_model import Block
from model.undrawn import undrawn
from parallel.mesh import Layout, Place
from parallel.rank_model import model_of_rank
from pretrain.config import Batches, Recipe
from pretrain.data import Data, Source
from pretrain.initialization import check_initial_weights
from pretrain.layout_table import layout_lines
from pretrain.phase_data import check_vocabulary, describe_data, require_same_tokenizer
from pretrain.phases import Phases
from pretrain.quantities import size_text

_LOSS_CHUNK_TOKENS = 1024  # rows of logits that the chunked cross-entropy holds at a time


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank. Parameters, gradients and optimizer are counted; activations and states are estimates from the
    shapes.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    boundary_states: int
    """Those that wait on the device; with auto, which is to choose by them, those that would."""
    carried_states: int
    """Those that rows carry from step to step."""
    host: int
    """Of parameters and optimizer, what is kept in the host's memory instead, and is not counted above."""

    @property
    def total(self) -> int:
        """The sum of what is on the device."""
        return sum(vars(self).values()) - self.host


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model, counted without allocating or drawing them."""
    return undrawn(lambda: TitansLM(config)).num_parameters()


def estimate_memory(
    recipe: Recipe, parameters: int, ranks: int, *, stage: int = 0, layers: int | None = None
) -> MemoryEstimate:
    """The memory of one rank of `ranks`.

    Args:
        parameters: those that the rank has of the model (`parallel.rank_model`), and ZeRO divides.
        stage, layers: its place in a pipeline, and how many of the model's layers it has; None: all.
    """
    parallel, layout = recipe.parallel, recipe.parallel.layout(ranks)
    width, replicas = 2 if parallel.precision == "bf16" else 4, layout.data * layout.sequence

    def share(first_stage: int) -> int:
        return replicas if parallel.zero_stage >= first_stage else 1

    rows = recipe.training.batch_tokens // recipe.training.sequence_length // layout.data
    activations = activation_bytes(recipe, width, tensor=layout.tensor, sequence=layout.sequence)
    part = 1.0 if layers is None else layers / recipe.model.num_layers
    graphs, waiting = _in_flight(recipe, behind=layout.pipeline - 1 - stage, rows=rows)
    on_device = recipe.training.boundary_states in ("auto", "device")
    # The fp32 copy that the optimizer steps, and its two moments; without ZeRO in fp32 the parameters are that copy.
    copies = 2 if parallel.zero_stage == 0 else 3
    weights, stepped = width * parameters // share(3), 4 * copies * parameters // share(1)
    return MemoryEstimate(
        parameters=0 if parallel.offload_parameters else weights,
        gradients=_gradient_bytes(recipe, parameters, layout),
        optimizer=0 if parallel.offload_optimizer else stepped,
        activations=round(activations * part * graphs),
        boundary_states=_boundaries_of_stage(recipe, width, part, waiting, arrive=stage > 0) if on_device else 0,
        carried_states=round(carried_bytes(recipe, rows) // ranks_of_heads(recipe) * part),
        host=weights * parallel.offload_parameters + stepped * parallel.offload_optimizer,
    )


def _in_flight(recipe: Recipe, *, behind: int, rows: int) -> tuple[int, float]:
    """Of how many passes a stage of a pipeline holds the activations, until their gradient is back from the stages
    `behind` it; and how many stretches of segments wait as boundaries.
    """
    training = recipe.training
    if training.segment_length is None:
        return min(behind + 1, max(rows // training.micro_batch_size, 1)), 0.0
    stretch = stretch_segments(recipe)
    # The last pass of each stretch keeps its own; another one is being run again.
    graphs = 1 + behind // stretch + (1 if behind and stretch > 1 else 0)
    return graphs, (stretch + behind) / stretch


def _boundaries_of_stage(recipe: Recipe, width: int, part: float, stretches: float, *, arrive: bool) -> int:
    """The boundaries that wait on a stage with so much of the layers; with what arrived from the stage before."""
    training = recipe.training
    held = boundary_bytes_of_rank(recipe) * part
    if arrive and training.segment_length is not None:
        segments = training.micro_batch_size * stretch_segments(recipe)
        tokens = segments * training.segment_length // recipe.parallel.stretches
        held += width * tokens * recipe.model.dim
    return round(held * stretches)


def stretch_segments(recipe: Recipe) -> int:
    """Segments that gradients flow through at a time."""
    training = recipe.training
    return min(training.truncate_every or training.num_segments, training.num_segments)


def ranks_of_heads(recipe: Recipe) -> int:
    """Over how many ranks the heads of a row's state are divided."""
    return recipe.parallel.tensor * recipe.parallel.sequence


def boundary_bytes_of_rank(recipe: Recipe) -> int:
    """This rank's part of `boundary_bytes`: its heads'."""
    return boundary_bytes(recipe) // ranks_of_heads(recipe)


def _keeps_gradients_whole(recipe: Recipe, layout: Layout) -> bool:
    training = recipe.training
    rounds = training.batch_tokens // (training.sequence_length * training.micro_batch_size * layout.data)
    return recipe.parallel.keeps_gradients_whole(rounds * training.num_segments)


def _gradient_bytes(recipe: Recipe, parameters: int, layout: Layout) -> int:
    whole, share = 4 * parameters, 4 * parameters // (layout.data * layout.sequence)
    if not _keeps_gradients_whole(recipe, layout):
        return share
    # Stage 3 holds the memory of its share all the time.
    return whole + share if recipe.parallel.zero_stage == 3 else whole


def carried_bytes(recipe: Recipe, rows: int) -> int:
    """What `rows` rows carry from step to step, and with rollback hold of the step before beside it."""
    if not recipe.data.carries_state:
        return 0
    width = 2 if recipe.parallel.precision == "bf16" else 4
    # Behind as many steps as fill a window's cache.
    seen = max(recipe.training.sequence_length, recipe.model.window or 0)
    return rows * state_bytes(recipe.model, width, seen) * (2 if recipe.training.on_bad_state == "rollback" else 1)


def boundary_bytes(recipe: Recipe) -> int:
    """The states between segments that one micro-batch holds at a time, from the shapes of the model's state."""
    training, width = recipe.training, 2 if recipe.parallel.precision == "bf16" else 4
    if training.segment_length is None:
        return 0
    stretch = stretch_segments(recipe)
    # Before each segment that gradients flow through at a time stands one, but there is none at the row's beginning.
    segments = range(max(1, training.num_segments - stretch), training.num_segments)
    held = sum(state_bytes(recipe.model, width, segment * training.segment_length) for segment in segments)
    return training.micro_batch_size * held


def state_bytes(model: ModelConfig, width: int, seen: int) -> int:
    """The state of one row after `seen` tokens, with `width` bytes a number outside the memory's own weights: fp32
    weights and momentum, the attention's keys and values; tails and open chunks, which are small, left out.
    """
    weights = 0
    if model.memory is not None:
        widths = [model.head_dim, *[model.memory.expansion * model.head_dim] * (model.memory.depth - 1), model.head_dim]
        weights = 4 * model.num_heads * sum(before * after for before, after in pairwise(widths))
    if model.variant == "mac":
        inside = seen % model.segment
        # Inside a segment also the weights at its start; two streams of keys and values: tokens and the memory's reads.
        return model.num_layers * (weights * (3 if inside else 2) + 4 * width * inside * model.dim)
    cached = 0
    if model.has_attention:
        cached = seen if model.window is None else min(seen, model.window - 1)
    return model.num_layers * (2 * weights + 2 * width * cached * model.dim)


def activation_bytes(recipe: Recipe, width: int, *, tensor: int = 1, sequence: int = 1) -> int:
    """What the backward pass of a micro-batch, or of a segment of it, keeps on one of as many ranks, with `width` bytes
    a number; estimated from the shapes.
    """
    model, training = recipe.model, recipe.training
    tokens = training.micro_batch_size * (training.segment_length or training.sequence_length) // sequence
    # Inputs and outputs of norms, projections and gates of a mixer and of the feed-forward, in units of their widths.
    # The residual stream and what is normalised of it are whole on each tensor rank: 3 of each sum. With sharded norms
    # what is gathered alone is, and of a mac what goes from segment to segment.
    is_sharded = recipe.parallel.tensor_shard_norms
    whole = 3 if not is_sharded else 2 if model.variant == "mac" else 1
    layer = width * tokens * (_divided(14, tensor, whole) if model.memory else 0) * model.dim
    layer += width * tokens * (_divided(10, tensor, whole) if model.has_attention else 0) * model.dim
    layer += width * tokens * (3 * model.ffn_dim / tensor + _divided(3, tensor, 1 if is_sharded else 3) * model.dim)
    if model.memory is not None:  # fp32 features of keys and queries, and the gradients at them, in each memory layer
        layer += 4 * tokens * 4 * model.dim / tensor * (1 + model.memory.expansion * (model.memory.depth - 1))
    loss = 2 * 4 * min(tokens, _LOSS_CHUNK_TOKENS) * model.vocab_size / tensor
    if recipe.parallel.activation_checkpointing:
        stretch = tokens / tensor if is_sharded else tokens
        return round(width * stretch * model.dim * model.num_layers + layer + loss)
    return round(layer * model.num_layers + loss)


def _divided(widths: int, tensor: int, whole: int) -> float:
    return whole + (widths - whole) / tensor


def memory_by_part(recipe: Recipe, ranks: int) -> dict[tuple[int, int], tuple[int, MemoryEstimate]]:
    """The parameters that ranks have of the model and their estimated memory, by place along pipeline and tensor: the
    other axes' ranks read other tokens with the same part.
    """
    layout, found = recipe.parallel.layout(ranks), {}
    for stage, tensor in product(range(layout.pipeline), range(layout.tensor)):
        rank, context = layout.rank(Place(stage, 0, 0, tensor)), recipe.training.sequence_length
        model = model_of_rank(recipe.model, layout, rank, context=context, balance=recipe.parallel.balance_stages)
        parameters, layers = model.num_parameters(), sum(isinstance(block, Block) for block in model.blocks)
        found[stage, tensor] = parameters, estimate_memory(recipe, parameters, ranks, stage=stage, layers=layers)
    return found


def describe(phases: Phases, ranks: int) -> str:
    """The dry run's text: the resolved recipe as YAML, then what follows from it as YAML comments, phase by phase.

    Raises UserError for sizes that do not fit, and for data or initial weights that are there and damaged or do not
    fit the model.
    """
    phases.require_fit(ranks)
    parameters = num_parameters(phases.run.model)
    lines = [f"parameters          {parameters:,}"]
    sources = []
    for phase in phases:
        with phase.named_in_errors():
            data = _open_data(phase.recipe)
            sources += [] if data is None else [data.train]
            if sources:
                require_same_tokenizer(sources[0], sources[-1])
            of_phase = _phase_lines(phase.recipe, phase.batches(ranks), data, ranks)
            if data is not None:
                data.close()
        if len(phases) > 1:
            lines += ["", phase.title]
            of_phase = [f"  {line}" for line in of_phase]
        lines += of_phase
    if len(phases) > 1:
        lines += ["", *_total_lines(phases, ranks)]
    lines += _initialization_lines(phases.run, sources)
    asked = phases.run.checkpoint
    stays = "" if len(phases) == 1 else ", and the last of each phase"
    stays += "" if asked.keep_every_tokens is None else f", and one every {asked.keep_every_tokens:,} tokens"
    beside = "; written from copies in the hosts' memory, of the same size" if asked.asynchronous else ""
    copied = "" if asked.upload is None else f"; copied to {asked.upload}"
    lines.append(f"a checkpoint        {size_text(12 * parameters)}; {asked.keep} are kept{stays}{beside}{copied}")
    return phases.to_yaml() + "\n" + "\n".join(f"# {line}".rstrip() for line in lines)


def _phase_lines(recipe: Recipe, batches: Batches, data: Data | None, ranks: int) -> list[str]:
    layout = recipe.parallel.layout(ranks)
    context = recipe.training.sequence_length
    flops = flops_per_token(recipe.model, context)
    parts = memory_by_part(recipe, ranks)
    memory = max((estimate for _, estimate in parts.values()), key=lambda estimate: estimate.total)
    whole, carries = recipe.training.segment_length is None, recipe.data.carries_state
    return [
        f"tokens              {batches.total_tokens:,} in {batches.steps:,} steps of {recipe.training.batch_tokens:,}",
        f"a step              {batches.rows} rows of {context:,} = {layout.data} rank(s) x {batches.accumulation} "
        f"micro-batch(es) x {recipe.training.micro_batch_size} row(s)",
        *_carried_lines(recipe, batches),
        *_segment_lines(recipe),
        *([f"RoPE base           {recipe.model.rope_base:,.0f}"] if recipe.model.has_attention else []),
        f"learning rate       {_schedule(recipe)}",
        f"FLOPs a token       {flops.total:,.0f} (memory's inner updates: {flops.memory:,.0f})",
        f"FLOPs in all        {flops.total * batches.total_tokens:.3g}",
        *_data_lines(recipe, data, batches),
        *layout_lines(recipe, ranks, parts, whole_gradients=_keeps_gradients_whole(recipe, layout)),
        f"memory of a rank    {size_text(memory.total)} (estimate)",
        f"  parameters        {size_text(memory.parameters)}",
        f"  gradients         {size_text(memory.gradients)}",
        f"  optimizer         {size_text(memory.optimizer)}",
        f"  activations       {size_text(memory.activations)}, {'one micro-batch' if whole else 'a segment of one'}, "
        "estimated from the shapes",
        *([] if whole else [f"  boundary states   {_boundary_text(recipe, memory)}"]),
        *([f"  carried states    {size_text(memory.carried_states)}, estimated from the shapes"] if carries else []),
        *([f"  on the host       {size_text(memory.host)}, offloaded"] if memory.host else []),
    ]


def _boundary_text(recipe: Recipe, memory: MemoryEstimate) -> str:
    elsewhere = ", where they wait on the device" if recipe.training.boundary_states == "auto" else ""
    return f"{size_text(memory.boundary_states)}{elsewhere}, estimated from the shapes"


def _total_lines(phases: Phases, ranks: int) -> list[str]:
    batches = [phase.batches(ranks) for phase in phases]
    tokens = [each.total_tokens for each in batches]
    lengths = [phase.recipe.training.sequence_length for phase in phases]
    flops = [
        flops_per_token(phase.recipe.model, length).total * count
        for phase, length, count in zip(phases, lengths, tokens, strict=True)
    ]
    memory = max(found.total for phase in phases for _, found in memory_by_part(phase.recipe, ranks).values())
    return [
        "all phases",
        f"  tokens              {sum(tokens):,} in {sum(each.steps for each in batches):,} steps",
        f"  FLOPs               {sum(flops):.3g}",
        f"  memory of a rank    {size_text(memory)} at the most (estimate)",
    ]


def _schedule(recipe: Recipe) -> str:
    schedule, lr = recipe.schedule, recipe.optimizer.lr
    warmup = f", warm-up over {schedule.warmup_tokens:,} tokens" if schedule.warmup_tokens else ""
    end = "" if schedule.kind == "constant" else f" to {lr * schedule.min_lr_ratio:g}"
    return f"{schedule.kind}, {lr:g}{end}{warmup}"


def _initialization_lines(run: Recipe, sources: list[Source]) -> list[str]:
    if run.initialize_from is None:
        return []
    if not run.initialize_from.exists():
        return [f"initial weights     {run.initialize_from} is not there yet"]
    if sources:
        check_initial_weights(run, sources[0].tokenizer, every_byte=False)
    return [f"initial weights     of {run.initialize_from}"]


def _carried_lines(recipe: Recipe, batches: Batches) -> list[str]:
    if not recipe.data.carries_state:
        return []
    size = size_text(carried_bytes(recipe, batches.rows))
    return [f"  carried states    {batches.rows} rows that go on from step to step: {size} over all ranks"]


def _segment_lines(recipe: Recipe) -> list[str]:
    training = recipe.training
    if training.segment_length is None:
        return []
    gradient = "exact: through the whole row"
    if training.gradient == "truncated":
        gradient = f"truncated: it stops every {training.truncate_every} segment(s)"
    places = {
        "auto": "on the device, in the host's memory or on disk, by the room there when the phase begins",
        "device": "on the device",
        "host": "in the host's memory",
        "disk": "on disk, in the run's folder",
    }
    return [
        f"a row               {training.num_segments} segment(s) of {training.segment_length:,} tokens",
        f"  gradient          {gradient}",
        f"  boundary states   {size_text(boundary_bytes(recipe))} at a time, {places[training.boundary_states]}",
    ]


def _open_data(recipe: Recipe) -> Data | None:
    """The data, checked against the model; None where it is not there."""
    if recipe.data.missing() is not None:
        return None
    data = recipe.data.open(recipe.data_seed(), grid=recipe.model.grid)
    check_vocabulary(recipe, data.train)
    return data


def _data_lines(recipe: Recipe, data: Data | None, batches: Batches) -> list[str]:
    if data is None:
        return [f"data                {recipe.data.missing()} is not there yet"]
    lines = [f"data                {describe_data(recipe, batches, data.train)}"]
    if data.held_out is not None:
        lines.append(f"held-out data       {data.held_out.describe()}")
    return lines
