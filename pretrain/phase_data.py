"""Whether the data of all phases suits the one model that is trained on it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from pretrain.config import Batches, Recipe
from pretrain.data import Damage, Data, Share, Source, TokenizerInfo
from pretrain.errors import UserError
from pretrain.phases import Phase, Phases
from pretrain.quantities import size_text


def check_data(phases: Phases, ranks: int) -> tuple[TokenizerInfo | None, list[str]]:
    """The one tokenizer of all phases' data (None for data that stand for no text), and a line about each phase's. What
    they hold is not read through.

    Raises UserError for data that is not there or does not fit the model, and for phases with different tokenizers.
    """
    sources: list[Source] = []
    descriptions = []
    for phase in phases:
        with phase.named_in_errors(), open_data(phase) as data:
            sources.append(data.train)
            check_vocabulary(phase.recipe, sources[-1])
            require_same_tokenizer(sources[0], sources[-1])
            descriptions.append(describe_data(phase.recipe, phase.batches(ranks), sources[-1]))
    return sources[0].tokenizer, descriptions


def verify_data(phases: Sequence[Phase], share: Share, say: Callable[[str], None]) -> list[Damage]:
    """Read through the content of these phases' data, as far as they ask for that, each place once: what a later phase
    would find damaged should not be found days later.

    Args:
        share: this process's part of the reading.
        say: told what is read, before it is.

    Returns what was found damaged where that is left out. Raises UserError where it is not, in any of the phases.
    """
    found: dict[str, int] = {}
    reading: list[tuple[Phase, set[str]]] = []
    for phase in phases:
        with phase.named_in_errors():
            places = phase.recipe.data.to_verify()
        if new := places.keys() - found.keys():
            reading.append((phase, new))
            found |= places
    if found:
        say(
            f"checking the sha256 of {size_text(sum(found.values()))} of shards in {', '.join(found)}; "
            "data.verify sizes skips it"
        )
    damage: list[Damage] = []
    for phase, places in reading:
        with phase.named_in_errors(), open_data(phase, share, places) as data:
            damage += data.train.damage
    for phase in phases:  # what one leaves out may end another, which did not read it again
        with phase.named_in_errors():
            phase.recipe.data.refuse_damage(damage)
    return damage


def open_data(phase: Phase, share: Share | None = None, places: Collection[str] | None = None) -> Data:
    """A phase's data; for `share` and `places` see SourceConfig.open. Raises UserError."""
    return phase.recipe.data.open(phase.recipe.data_seed(), share, grid=phase.recipe.model.grid, places=places)


def describe_data(recipe: Recipe, batches: Batches, source: Source) -> str:
    """A line about the training data beside what the run reads of it. Raises UserError for data that is too small."""
    return source.describe(
        batches.total_tokens, sequence_length=recipe.training.sequence_length, rows_per_step=batches.rows
    )


def check_vocabulary(recipe: Recipe, source: Source) -> None:
    """Raise UserError when the data holds tokens that the model has no row for."""
    have, need = recipe.model.vocab_size, source.vocab_size
    if need > have:
        raise UserError(
            f"model.vocab_size {have} is smaller than the {need} tokens of {source.place}: set model.vocab_size to "
            f"{need}"
        )


def require_same_tokenizer(first: Source, source: Source) -> None:
    """Raise UserError when the tokens of a phase's data mean something else than those of the first phase's."""
    hashes = [None if tokenizer is None else tokenizer.sha256 for tokenizer in (first.tokenizer, source.tokenizer)]
    if hashes[0] != hashes[1]:
        before, now = ("none" if sha256 is None else f"sha256 {sha256[:12]}" for sha256 in hashes)
        raise UserError(
            f"its data has another tokenizer ({now}: {source.place}) than the first phase's ({before}: {first.place}): "
            "tokens must mean the same in all phases; build the shards with one tokenizer"
        )
