"""What a rank hands to others in a training step: every message along each axis of a layout, with its bytes.

Counted after what `parallel.tensor_parallel`, `sharded_norms`, `sequence_parallel` and the pipeline's links send, and
DeepSpeed of gradients and parameters. Left out is what is small whatever the model: sums of losses and tokens, norms of
gradients, and whether they are finite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from kernels.cross_entropy import CHUNK_TOKENS
from parallel.mesh import Layout, Place
from parallel.shares import Held, padded
from pretrain.config import Recipe
from pretrain.plan import stretch_segments
from tools.plan.memory import held_parameters, layers_of_stages, number_bytes

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
Messages = Counter[tuple[Kind, int]]
"""How many of each kind and size. The size is in bytes: of the tensor that ranks sum, before they divide it where they
do; of what they have gathered; of what each of them divides in an all-to-all."""

_GATES = 3
"""Of a token and head, in fp32: what sequence ranks exchange of them at once."""


def sent_bytes(messages: Messages, ranks: int) -> float:
    """What each of so many ranks sends, where sums and gatherings go round in rings."""
    way = (ranks - 1) / ranks
    ways = {"all_reduce": 2 * way, "all_gather": way, "reduce_scatter": way, "all_to_all": way, "send": 1.0}
    return sum(ways[kind] * size * count for (kind, size), count in messages.items())


def along_tensor(recipe: Recipe, layout: Layout, stage: int) -> Messages:
    """Of activations, between the tensor ranks of a stage, in a step."""
    return _of_passes(recipe, layout, stage, _over_tensor_ranks) if layout.tensor > 1 else Counter()


def along_sequence(recipe: Recipe, layout: Layout, stage: int) -> Messages:
    """Of activations, between the sequence ranks of a stage, in a step."""
    return _of_passes(recipe, layout, stage, _over_sequence_ranks) if layout.sequence > 1 else Counter()


def along_pipeline(recipe: Recipe, layout: Layout, stage: int) -> Messages:
    """Activations to the next stage, and their gradients to the one before, in a step."""
    return _of_passes(recipe, layout, stage, _to_other_stages) if layout.pipeline > 1 else Counter()


def over_tied_stages(recipe: Recipe, layout: Layout, stage: int) -> Messages:
    """The sum of the gradients of an embedding that the first stage and the last hold."""
    model = recipe.model
    if layout.pipeline == 1 or not model.tie_embeddings or stage not in (0, layout.pipeline - 1):
        return Counter()
    return Counter({("all_reduce", 4 * model.vocab_size * model.dim // layout.tensor): 1})


def of_gradients(recipe: Recipe, layout: Layout, stage: int) -> Messages:
    """Their sum over the replicas of a stage, fp32, once. DeepSpeed's stages 1 and 2 sum all of them on every rank,
    though each rank keeps a share alone; stage 3 divides what it sums.
    """
    if layout.data * layout.sequence == 1:
        return Counter()
    if recipe.parallel.zero_stage == 3:
        return Counter({("reduce_scatter", 4 * _whole_shares(recipe, layout, stage)): 1})
    elements = sum(h.numel for group in _held(recipe, layout, stage) for h in group)
    # A bucket ends with a parameter: those of a run are a little smaller than this or, of one parameter, larger.
    bucket = min(recipe.parallel.bucket_elements, elements)
    sent: Messages = Counter({("all_reduce", 4 * bucket): elements // bucket})
    if elements % bucket:
        sent["all_reduce", 4 * (elements % bucket)] += 1
    return sent


def of_parameters(recipe: Recipe, layout: Layout, stage: int) -> Messages:
    """Their gathering over the replicas of a stage, once: of ZeRO 1 and 2 behind a step, by the optimizer's groups; of
    ZeRO 3 before a forward or backward pass, in as many messages as there are modules (here in one).
    """
    replicas, parallel, width = layout.data * layout.sequence, recipe.parallel, number_bytes(recipe)
    if replicas == 1 or parallel.zero_stage == 0:
        return Counter()
    if parallel.zero_stage == 3:
        size = width * _whole_shares(recipe, layout, stage, above=parallel.keep_gathered_below)
        return Counter({("all_gather", size): 1}) if size else Counter()
    sizes = [sum(h.numel for h in group) for group in _held(recipe, layout, stage)]
    return Counter(("all_gather", width * padded(size, replicas)) for size in sizes if size)


def _held(recipe: Recipe, layout: Layout, stage: int) -> tuple[tuple[Held, ...], ...]:
    return held_parameters(recipe, layout, layout.rank(Place(stage, 0, 0, 0)))


def _whole_shares(recipe: Recipe, layout: Layout, stage: int, *, above: int = 0) -> int:
    """Elements of the parameters with more than so many of them, each filled up to a share for each replica."""
    replicas = layout.data * layout.sequence
    held = (h.numel for group in _held(recipe, layout, stage) for h in group if h.numel > above)
    return sum(-(-numel // replicas) * replicas for numel in held)


@dataclass(frozen=True)
class _Pass:
    """A forward and backward pass of a micro-batch, or of a segment of it, on a rank of a stage."""

    recipe: Recipe
    layout: Layout
    layers: int
    is_first: bool
    """Whether the stage begins from tokens."""
    is_last: bool
    """Whether it ends in a loss."""
    pieces: tuple[int, ...]
    """Tokens of a row, by the mac's running segments; of other models all in one."""
    forwards: int
    """Two where the pass is run again from its boundary."""

    @property
    def tokens(self) -> int:
        """Of all its rows, on a sequence rank."""
        return self.recipe.training.micro_batch_size * sum(self.pieces) // self.layout.sequence

    @property
    def is_sharded(self) -> bool:
        """Whether tensor ranks hold stretches of the activations between layers."""
        return self.recipe.parallel.tensor_shard_norms

    def size(self, tokens: int) -> int:
        """Bytes of so many tokens in the model's width."""
        return number_bytes(self.recipe) * tokens * self.recipe.model.dim

    @property
    def activations(self) -> int:
        """Bytes of all tokens, in the model's width."""
        return self.size(self.tokens)

    @property
    def joined(self) -> tuple[Kind, int]:
        """What stands behind a map that is cut by its inputs."""
        return "reduce_scatter" if self.is_sharded else "all_reduce", self.activations


class _Both(NamedTuple):
    """What goes forward and what goes backward."""

    forward: Messages
    backward: Messages

    def and_also(self, other: _Both) -> _Both:
        """Both of them."""
        return _Both(self.forward + other.forward, self.backward + other.backward)

    def repeated(self, times: int) -> _Both:
        """So often."""
        return _Both(*(_repeated(way, times) for way in self))


def _repeated(messages: Messages, times: int) -> Messages:
    return Counter({message: count * times for message, count in messages.items()})


def _of_passes(recipe: Recipe, layout: Layout, stage: int, messages_of: Callable[[_Pass], Messages]) -> Messages:
    training, layers = recipe.training, len(layers_of_stages(recipe, layout)[stage])
    length, stretch = training.sequence_length // training.num_segments, stretch_segments(recipe)
    alike: Counter[tuple[tuple[int, ...], int]] = Counter()
    for number in range(training.num_segments):
        ends_stretch = number % stretch == stretch - 1 or number == training.num_segments - 1
        alike[_pieces(recipe.model.segment, number * length, length), 1 if ends_stretch else 2] += 1
    accumulation = training.batch_tokens // (training.sequence_length * training.micro_batch_size * layout.data)
    sent: Messages = Counter()
    for (pieces, forwards), times in alike.items():
        one = _Pass(recipe, layout, layers, stage == 0, stage == layout.pipeline - 1, pieces, forwards)
        sent += _repeated(messages_of(one), times * accumulation)
    return sent


def _pieces(segment: int | None, start: int, length: int) -> tuple[int, ...]:
    """The tokens behind `start`, by the running segments that they lie in."""
    if segment is None:
        return (length,)
    edges = [start, *range(start // segment * segment + segment, start + length, segment), start + length]
    return tuple(last - first for first, last in pairwise(edges))


def _over_tensor_ranks(one: _Pass) -> Messages:
    block = _mixer(one).and_also(_join(one)).and_also(_cut(one)).and_also(_norms(one, 1))
    both = block.repeated(one.layers).and_also(_ends(one))
    sent = _repeated(both.forward, one.forwards) + both.backward
    if one.recipe.parallel.activation_checkpointing:
        # The backward pass runs a block again as far as something was kept for it: not its last sum.
        sent += _repeated(block.forward - Counter({one.joined: 1}), one.layers)
    return sent


def _cut(one: _Pass) -> _Both:
    """A layer that is cut by its maps' outputs and, last, inputs: of what comes in, the gradients are summed, and of
    what goes out the parts. With sharded norms a stretch goes out, and what comes in was gathered behind a norm.
    """
    if one.is_sharded:
        return _Both(Counter({one.joined: 1}), Counter({("all_gather", one.activations): 1}))
    return _Both(Counter({one.joined: 1}), Counter({one.joined: 1}))


def _norms(one: _Pass, norms: int, *, for_parts: bool = True) -> _Both:
    """Sharded norms: what they give is gathered, and its gradient summed where ranks compute parts from it; so is their
    weights', each of which has seen a stretch.
    """
    both = _Both(Counter(), Counter())
    if one.is_sharded:
        both.forward["all_gather", one.activations] += norms
        both.backward["all_reduce", one.size(1)] += norms
        if for_parts:
            both.backward["reduce_scatter", one.activations] += norms
    return both


def _mixer(one: _Pass) -> _Both:
    model = one.recipe.model
    runs = 1
    if model.variant == "mac":
        both = _norms(one, 1, for_parts=False)
        runs = len(one.pieces)
        for tokens in one.pieces:
            # Tokens and h to the attention, tokens and the attention's output to the memory, which is read twice.
            piece = one.size(one.recipe.training.micro_batch_size * tokens)
            both.forward["all_reduce", piece] += 3
            both.backward["all_reduce", piece] += 4
    else:
        layers = model.has_attention + (model.memory is not None)
        both = _cut(one).repeated(layers).and_also(_norms(one, 2 if model.variant == "mal" else 1))
    if model.num_persistent:
        both.backward["all_reduce", one.size(model.num_persistent)] += runs
    return both


def _join(one: _Pass) -> _Both:
    """Where attention and memory are joined: gates are cut by their outputs, so that each rank has some channels'."""
    model, both = one.recipe.model, _Both(Counter(), Counter())
    if model.variant not in ("mac", "mag"):
        return both
    is_gated, is_mac = model.join == "sum", model.variant == "mac"
    if one.is_sharded:
        both.backward["all_reduce", one.size(1)] += 2  # its norms' weights
        if is_mac:  # which hands over whole what is joined by stretches
            both.backward["all_gather", one.activations] += 2
    if is_gated and one.is_sharded:
        for way in both:
            way["all_to_all", one.activations // one.layout.tensor] += 2
    elif is_gated:
        both.forward["all_gather", one.activations] += 1
        both.backward["all_gather", one.activations] += 2
    if is_gated and (is_mac or not one.is_sharded):
        both.backward["all_reduce", one.activations] += 1  # tokens that the gates read
    return both


def _ends(one: _Pass) -> _Both:
    """Embedding, and head with loss: of chunks of tokens the largest logits, and the sums of two numbers, in fp32."""
    both = _Both(Counter(), Counter())
    if one.is_first:
        both.forward[one.joined] += 1
        if one.is_sharded:
            both.backward["all_gather", one.activations] += 1
    if one.is_last:
        if not one.is_sharded:
            both.backward["all_reduce", one.activations] += 1
        both = both.and_also(_norms(one, 1))
        for start in range(0, one.tokens, CHUNK_TOKENS):
            tokens = min(CHUNK_TOKENS, one.tokens - start)
            both.forward["all_reduce", 4 * tokens] += 1
            both.forward["all_reduce", 8 * tokens] += 1
    return both


def _over_sequence_ranks(one: _Pass) -> Messages:
    """Queries, keys, values and what comes back of them, and a memory's gates: forward from stretches to heads and
    back, backward the same the other way.
    """
    model = one.recipe.model
    layers = model.has_attention + (model.memory is not None)
    block: Messages = Counter({("all_to_all", one.activations // one.layout.tensor): 4 * layers})
    if model.memory is not None:
        block["all_to_all", 4 * _GATES * one.tokens * model.num_heads // one.layout.tensor] += 1
    runs = one.forwards + one.recipe.parallel.activation_checkpointing
    return _repeated(block, one.layers * (runs + 1))


def _to_other_stages(one: _Pass) -> Messages:
    # Where tensor ranks hold stretches of the activations, each sends its own.
    stretch = one.activations // (one.layout.tensor if one.is_sharded else 1)
    return Counter({("send", stretch): 2 - one.is_first - one.is_last})
