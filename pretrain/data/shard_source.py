"""Shard sets as a source of training rows and of held-out text."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.data.best_fit import BestFit
from pretrain.data.cursor import Cursor, SourceCursor
from pretrain.data.damage import Damage, SkippedShard
from pretrain.data.loader import Agree, Batch, Division, Loader, RowReader
from pretrain.data.packing import Packing, Part, Pool, Selection
from pretrain.data.rows import Rows
from pretrain.data.shards import OnDamage, ShardSet, TokenizerInfo
from pretrain.data.validation import sequential_batches
from pretrain.errors import UserError

ALONE = "train"
"""Name of the one source in a cursor."""


@dataclass(frozen=True)
class ShardSource:
    """Packed rows of a shard set, or of a mixture of several (see `pretrain.data.packing`), pass after pass."""

    parts: tuple[Part, ...]
    """At least one; all of one tokenizer."""
    seed: int
    selection: Selection
    num_workers: int
    on_damage: OnDamage = "stop"
    """Whether a shard that is missing or damaged ends the run, or its documents are left out."""
    allow_changed: bool = False
    """Whether a cursor of other data is gone on from."""

    @property
    def shards(self) -> ShardSet:
        """The first part's."""
        return self.parts[0].shards

    @property
    def place(self) -> str:
        """Where the data comes from, as messages say it."""
        return f"the tokenizer of {self.shards.folder}"

    @property
    def vocab_size(self) -> int:
        """Pieces of the tokenizer."""
        return self.shards.tokenizer.vocab_size

    @property
    def tokenizer(self) -> TokenizerInfo | None:
        """The tokenizer that made the shards."""
        return self.shards.tokenizer

    @property
    def fingerprint(self) -> str:
        """Identity of all sets together; that of the set where there is one."""
        found = {part.shards.fingerprint: None for part in self.parts}
        return next(iter(found)) if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()

    def close(self) -> None:
        """See `Source.close`."""
        for part in self.parts:
            part.shards.close()

    @property
    def damage(self) -> list[Damage]:
        """See `Source.damage`."""
        return [damage for part in self.parts for damage in part.shards.damage]

    def share_damage(self, agree: Agree, known: Sequence[Damage]) -> None:
        """See `Source.share_damage`."""
        if self.on_damage == "skip":
            skip(self.parts, [damage for rank in agree([*self.damage, *known]) for damage in rank])

    def open_loader(self, division: Division, cursor: Cursor | None, agree: Agree | None = None) -> Loader:
        """The iterator over a rank's steps. Raises UserError for a set too small for one row, a cursor of another
        length, seed or order, one of other data where that is not allowed, and where all shards of a source are
        damaged.
        """
        length, rows_per_step = division.sequence_length, division.rows_per_step
        lanes = rows_per_step if self.selection.order == "streams" else None
        begin = PackedRows(self._packing(length, rows_per_step)).cursor_at(
            Cursor(
                position=0,
                sequence_length=length,
                seed=self.seed,
                fingerprint=self.fingerprint,
                tokenizer=self.shards.tokenizer.sha256,
                rows_per_step=lanes,
                **dict(self.selection),
            ),
            0,
        )
        changes: list[str] = []
        if cursor is not None:
            cursor.require_order_of(begin)
            changes = cursor.data_differences(begin)
            if changes and not self.allow_changed:
                raise UserError(
                    f"the checkpoint's data cursor does not fit this run: {'; '.join(changes)}; set the data of "
                    f"{self.shards.folder} back to what the run began with, go on with what it is now by "
                    "--data.allow_changed true, or start a new run"
                )
            self._skip_as_before(cursor, begin)
            begin = self._moved(cursor, begin, changed=bool(changes))
        require_undamaged(self.parts)
        before = [begin.sources[name].before for name in self._names]
        packing = self._packing(length, rows_per_step, origin=begin.origin, before=before)
        agree = agree if self.on_damage == "skip" else None
        return Loader(PackedRows(packing), begin, division, self.num_workers, agree, changes)

    def describe(self, total_tokens: int, *, sequence_length: int, rows_per_step: int) -> str:
        """Documents, tokens, passes over them, padding, what of the rows is of each part, and damage that is left out.

        Raises UserError where all of it may not be read as often as the run needs, or all shards of a source are
        damaged.
        """
        require_undamaged(self.parts)
        packing = self._packing(sequence_length, rows_per_step)
        rows = -(-total_tokens // sequence_length)
        if packing.end is not None and packing.end < rows:
            raise UserError(
                f"data.sources: behind {packing.end * sequence_length:,} of the {total_tokens:,} tokens no source is "
                "left that has not been read max_epochs times: raise max_epochs of one, or lower training.tokens to "
                f"{packing.end * sequence_length}"
            )
        several, long = len(self.parts) > 1, self.selection.long_documents is not None
        shares = packing.shares
        if any(pool.limit is not None for pool in packing.pools):  # what one would have had, others get
            shares = [count / rows for count in packing.counts(rows)]
        lines = [
            _describe(pool, share * total_tokens, share if several else None, "" if long else pool.part.name)
            for pool, share in zip(packing.pools, shares, strict=True)
        ]
        lines += [f"skipped as damaged: {shard}" for shard in skipped_of(self.parts)]
        return "; ".join(lines)

    @property
    def _names(self) -> list[str]:
        return [part.name or ALONE for part in self.parts]

    def _packing(
        self, sequence_length: int, rows_per_step: int, origin: int = 0, before: Sequence[int] = ()
    ) -> Packing:
        return Packing(
            self.parts,
            sequence_length=sequence_length,
            seed=self.seed,
            selection=self.selection,
            rows_per_step=rows_per_step,
            origin=origin,
            before=before,
        )

    def _moved(self, cursor: Cursor, begin: Cursor, *, changed: bool) -> Cursor:
        """The place of `cursor` in this run's data, whose beginning is `begin`."""
        origin = cursor.position if changed else cursor.origin
        sources = {}
        for name, now in begin.sources.items():
            then = cursor.sources.get(name)
            if not cursor.sources and name == ALONE:  # from before they were noted
                before = cursor.position if changed else 0
            else:
                before = 0 if then is None else then.position if changed else then.before
            sources[name] = now.model_copy(update={"before": before})
        return begin.model_copy(update={"position": cursor.position, "origin": origin, "sources": sources})

    def _skip_as_before(self, cursor: Cursor, begin: Cursor) -> None:
        """Leaves out the shards that the run left out before, of sets that are what they were."""
        for shard in cursor.skipped:
            name = shard.source or ALONE
            then, now = cursor.sources.get(name), begin.sources.get(name)
            if then is not None and now is not None and then.fingerprint == now.fingerprint:
                own = self.parts[self._names.index(name)].shards
                number = [entry.name for entry in own.manifest.shards].index(shard.shard)
                own.skipped.setdefault(number, shard.found)


class PackedRows(RowReader):
    """The rows of a packing, and where a run stands in its parts."""

    def __init__(self, packing: Packing) -> None:
        self._packing = packing

    def read(self, samples: np.ndarray) -> Rows:
        """See `Packing.read`."""
        return self._packing.read(samples)

    def skip(self, damage: Sequence[Damage]) -> None:
        """See `RowReader.skip`. Raises UserError where no shard of a source is left."""
        parts = [pool.part for pool in self._packing.pools]
        skip(parts, damage)
        require_undamaged(parts)

    def cursor_at(self, start: Cursor, position: int) -> Cursor:
        """See `RowReader.cursor_at`."""
        packing = self._packing
        parts = [pool.part for pool in packing.pools]
        total = sum(part.weight for part in parts)
        sources = {
            pool.part.name or ALONE: SourceCursor(
                position=count,
                epoch=count // pool.rows_per_epoch,
                before=before,
                weight=str(pool.part.weight / total),
                min_document_tokens=pool.part.at_least,
                max_epochs=None if pool.part.max_epochs is None else str(pool.part.max_epochs),
                fingerprint=pool.part.shards.fingerprint,
                documents=pool.part.shards.documents,
                tokens=pool.part.shards.tokens,
            )
            for pool, count, before in zip(packing.pools, packing.counts(position), packing.before, strict=True)
        }
        update = {"position": position, "sources": sources, "skipped": tuple(skipped_of(parts))}
        return start.model_copy(update=update)

    def curves_at(self, position: int) -> dict[str, float]:
        """`data/epochs/<source>`: passes over each; `data/share/<source>`: its share of the tokens read so far, where
        there are several; `data/skipped_documents`: those in shards that are left out, where there are any.
        """
        pools, counts = self._packing.pools, self._packing.counts(position)
        found = {}
        for pool, count in zip(pools, counts, strict=True):
            name = pool.part.name or ("all" if len(pools) > 1 else ALONE)
            found[f"data/epochs/{name}"] = count / pool.rows_per_epoch
            if len(pools) > 1:
                found[f"data/share/{name}"] = count / max(sum(counts), 1)
        shards = skipped_of([pool.part for pool in pools])
        if shards:
            found["data/skipped_shards"] = float(len(shards))
            found["data/skipped_documents"] = float(sum(shard.documents for shard in shards))
        return found


def skip(parts: Sequence[Part], damage: Sequence[Damage]) -> None:
    """Leaves the documents of these shards out of the parts."""
    for part in parts:
        for each in damage:
            if each.place == str(part.shards.folder):
                part.shards.skipped.setdefault(each.number, each.found)


def require_undamaged(parts: Sequence[Part]) -> None:
    """Raises UserError where all shards of a part are left out: its rows would be without targets, unseen."""
    for part in parts:
        shards = part.shards
        if len(shards.skipped) == len(shards.manifest.shards):
            of = f" of data.sources.{part.name}" if part.name else ""
            raise UserError(
                f"{shards.folder}{of}: every shard is missing or damaged, {shards.manifest.shards[0].name} (found "
                f"{shards.skipped[0]}) and all others: nothing is left to train on; restore them, or remove the source"
            )


def skipped_of(parts: Sequence[Part]) -> list[SkippedShard]:
    """The shards that are left out, each once."""
    found = {}
    for part in parts:
        for number, what in sorted(part.shards.skipped.items()):
            entry = part.shards.manifest.shards[number]
            shard = SkippedShard(
                source=part.name,
                shard=entry.name,
                expected=entry.sha256,
                found=what,
                documents=entry.documents,
                tokens=entry.tokens,
            )
            found.setdefault((str(part.shards.folder), number), shard)
    return list(found.values())


def _describe(pool: Pool, tokens: float, share: float | None, name: str) -> str:
    """One pool, of which a run reads so many tokens, padding included; `share`: of the rows, where there are others;
    `name`: of its source, where it has one.
    """
    stream = pool.stream
    text = f"{stream.documents:,} documents, {stream.tokens:,} tokens: {tokens / stream.inputs:.2f} passes over them"
    if stream.at_least > 1:
        text = text.replace("documents", f"documents of at least {stream.at_least:,} tokens", 1)
    if share is not None:
        text = f"{100 * share:.3g} % of the rows{f' {name}' if name else ''}: {text}"
    if stream.grid is not None:
        text += f", padded to multiples of {stream.grid}"
    if isinstance(stream, BestFit):
        text += f", {stream.cut:,} of them cut"
    if stream.padding:
        text += f": {100 * stream.padding:.2f} % of what is read is padding"
    return text


@dataclass(frozen=True)
class HeldOutShards:
    """A shard set read in stored order, every token a target once."""

    shards: ShardSet
    has_answers = False

    @property
    def token_bytes(self) -> np.ndarray | None:
        """int64 [vocab_size]: UTF-8 bytes of text that each token stands for."""
        return self.shards.token_bytes

    def batches(
        self, *, sequence_length: int, batch_size: int, max_tokens: int | None, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """See `pretrain.data.validation.sequential_batches`."""
        return sequential_batches(
            self.shards,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            rank=rank,
            world_size=world_size,
        )

    def describe(self) -> str:
        """Documents and tokens."""
        return f"{self.shards.documents:,} documents, {self.shards.tokens:,} tokens"

    def close(self) -> None:
        """See `HeldOut.close`."""
        self.shards.close()
