"""The state of a Titans model as transformers' `past_key_values`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from model.generation import PREFILL_TOKENS
from model.language_model import TitansLM
from model.state import ModelState


@dataclass(frozen=True)
class RowGroup:
    """Rows of a batch that have read equally many tokens since their beginnings, so that their chunks end together."""

    rows: Tensor
    """[n] int64: their places in the batch."""
    state: ModelState | None
    """Theirs; None before their first token."""

    def take(self, places: Tensor) -> RowGroup:
        """The rows at `places` [m] of the group, in that order; one may be taken several times."""
        state = None if self.state is None else self.state.select_rows(places)
        return RowGroup(self.rows[places], state)


class TitansCache(Cache):
    """What the model has read. Its size does not grow with that, but for the keys and values of full attention.

    Padding leaves a row's state as it was, wherever it stands: rows whose first tokens are padding begin later, each
    with whole chunks of its own, as if it were alone. Rows that have read different numbers of tokens are run apart.
    """

    is_compileable = False

    def __init__(self, num_layers: int, state: ModelState | None = None) -> None:
        """
        Args:
            num_layers: of the model.
            state: to go on from, of any number of rows that have read equally many tokens.
        """
        super().__init__(layers=[])
        self._num_layers = num_layers
        self._columns = 0
        self._groups: list[RowGroup] = []
        if state is not None:
            self._groups = [RowGroup(torch.arange(len(state.position), device=state.position.device), state)]
            self._columns = int(state.position.max())

    @property
    def state(self) -> ModelState | None:
        """The state of all rows in order; None before the first token.

        Raises:
            ValueError: rows were padded, and have read different numbers of tokens: they have no common state.
        """
        if len(self._groups) > 1:
            raise ValueError("rows have read different numbers of tokens: read them without padding for one state")
        return self._groups[0].state if self._groups else None

    def read(self, model: TitansLM, tokens: Tensor, mask: Tensor | None, num_logits: int) -> Tensor:
        """Reads tokens [B, T] after what was read before, and gives the last `num_logits` logits of each row.

        Args:
            mask: [B, T] bool, False for padding; None without any.

        Returns:
            [B, num_logits, V]; at padding those of the row's token before it, zeros where none is in this call.
        """
        batch, length = tokens.shape
        groups = self._groups or [RowGroup(torch.arange(batch, device=tokens.device), None)]
        if (rows := sum(len(group.rows) for group in groups)) != batch:
            raise ValueError(f"past_key_values has {rows} rows, input_ids {batch}: hand on the cache of the same batch")
        if mask is None and len(groups) == 1:
            logits, state = _forward(model, tokens, groups[0].state, num_logits)
            self._groups = [RowGroup(groups[0].rows, state)]
        else:
            mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
            logits, self._groups = _read_apart(model, tokens, mask, groups, num_logits)
        self._columns += length
        return logits

    def take_rows(self, sources: Tensor) -> None:
        """Makes row i what row sources[i] was; sources is [n] int64, n any number."""
        taken = []
        for group in self._groups:
            rows, places = (sources.to(group.rows.device)[:, None] == group.rows).nonzero(as_tuple=True)
            if len(rows):
                taken.append(RowGroup(rows, group.take(places).state))
        self._groups = taken

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Of beam search: each row goes on from another's state."""
        self.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        rows = sum(len(group.rows) for group in self._groups)
        self.take_rows(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows alone; indices is int64, or bool by row."""
        self.take_rows(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were read, padding included."""
        return self._columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: there is no limit."""
        return -1

    def get_mask_sizes(self, query: Tensor | int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the mask that goes with further tokens, given by their number or positions."""
        return self._columns + (query if isinstance(query, int) else len(query)), 0

    def reset(self) -> None:
        """Forgets everything."""
        self._groups, self._columns = [], 0

    def crop(self, max_length: int) -> None:
        """Raises ValueError, unless nothing is to go: what a memory has learned can't be taken out of it again."""
        if not (max_length >= self._columns or max_length == 0 == self._columns):
            raise ValueError(
                f"crop({max_length}) of {self._columns} tokens: a memory can't forget its last tokens; copy the cache "
                "before them (copy.deepcopy), and generate without an assistant model"
            )

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: there are no keys and values to update from outside."""
        raise ValueError("a TitansCache is filled by its model alone")

    def __len__(self) -> int:
        return self._num_layers


def _forward(model: TitansLM, tokens: Tensor, state: ModelState | None, num_logits: int) -> tuple[Tensor, ModelState]:
    """The last `num_logits` logits [n, num_logits, V], and the state after the tokens [n, T].

    Where not all logits are asked for and no gradient is wanted, the tokens before them are read in pieces, so that a
    prompt of any length takes the memory of a short one.
    """
    split = 0
    if not torch.is_grad_enabled() and num_logits < tokens.shape[1]:
        split = (tokens.shape[1] - num_logits) // PREFILL_TOKENS * PREFILL_TOKENS
    for piece in tokens[:, :split].split(PREFILL_TOKENS, 1) if split else ():
        state = model(piece, state, num_logits=1).state
    rest = tokens[:, split:]
    output = model(rest, state, num_logits=None if num_logits == rest.shape[1] else num_logits)
    return output.logits, output.state


def _read_apart(
    model: TitansLM, tokens: Tensor, mask: Tensor, groups: list[RowGroup], num_logits: int
) -> tuple[Tensor, list[RowGroup]]:
    """`TitansCache.read` for rows that are not all alike: the logits, and the groups after it."""
    logits: Tensor | None = None
    after = []
    for part, count in _alike(groups, mask.sum(1)):
        if count == 0:
            after.append(part)
            continue
        own_mask = mask[part.rows]
        own_tokens = tokens[part.rows][own_mask].view(-1, count)
        # Which of the row's tokens each column's logits are of; -1 before the first.
        places = own_mask.cumsum(1)[:, -num_logits:] - 1
        needed = count - int(places[:, 0].min().clamp(min=0))
        own, state = _forward(model, own_tokens, part.state, needed)
        after.append(RowGroup(part.rows, state))
        index = (places - (count - needed)).clamp(min=0)[..., None].expand(-1, -1, own.shape[-1])
        if logits is None:
            logits = own.new_zeros(len(tokens), places.shape[1], own.shape[-1])
        logits[part.rows] = own.gather(1, index).masked_fill((places < 0)[..., None], 0)
    if logits is None:  # padding alone
        logits = model.norm.weight.new_zeros(len(tokens), num_logits, model.config.vocab_size)
    return logits, after


def _alike(groups: list[RowGroup], counts: Tensor) -> Iterator[tuple[RowGroup, int]]:
    """The groups, divided by how many tokens their rows now read: counts [B], by row of the batch."""
    for group in groups:
        own = counts[group.rows]
        for count in own.unique().tolist():
            places = (own == count).nonzero().flatten()
            yield group if len(places) == len(own) else group.take(places), count
