"""Reads tokens with a model and keeps, for every token, layer and head, what the memory did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kernels.memory.options import MemoryOptions
from kernels.memory.token_norms import token_norms
from model import TitansLM
from model.gates import GateProjection, Gates
from model.memory import MemoryCore
from pretrain.errors import UserError

PIECE = 1024
"""Tokens that are read at a time."""


@dataclass(frozen=True)
class Quantity:
    """Something that a memory does at a token."""

    name: str
    title: str
    meaning: str
    is_norm: bool = True
    """Whether heads add up as the parts of one vector do; gates have a mean instead."""


QUANTITIES = (
    Quantity("surprise", "surprise", "norm of the gradient of the token's associative loss by the memory's weights, "
             "at the weights of its chunk's start (u_t, momentary surprise)"),
    Quantity("momentum", "accumulated surprise", "norm of S_t, past and momentary surprise together"),
    Quantity("change", "weight change", "norm of W_t - W_(t-1): what was written and what was forgotten at the token"),
    Quantity("retrieval", "retrieval", "norm of y_t, what the memory answers to the token's query after its write"),
    Quantity("alpha", "forgetting α", "share of the memory that is forgotten at the token", is_norm=False),
    Quantity("eta", "momentum η", "share of the past surprise that is kept", is_norm=False),
    Quantity("theta", "step θ", "step size, before the step bound", is_norm=False),
)  # fmt: skip
"""What is kept, [tokens, heads] in each layer."""


def memory_cores(model: TitansLM, name: str) -> list[MemoryCore]:
    """The model's memories, a layer each. Raises UserError, which calls the model `name`, for one without."""
    cores = [module for module in model.modules() if isinstance(module, MemoryCore)]
    if not cores:
        raise UserError(
            f"{name}: its variant is {model.config.variant}, which has no memory to look into; give a mac, mag, mal or "
            "lmm"
        )
    return cores


@dataclass(frozen=True)
class Trace:
    """What was read: one text."""

    layers: list[dict[str, np.ndarray]]
    """A layer's quantities by name, [tokens, heads] each."""
    losses: np.ndarray
    """[tokens]: -log p of each token in nats; nan for the first, which nothing is before."""

    def of_layers(self, quantity: Quantity) -> np.ndarray:
        """[layers, tokens]: over heads the root of the sum of squares, for norms, or the mean."""
        stacked = np.stack([layer[quantity.name].astype(np.float64) for layer in self.layers])
        return np.sqrt((stacked**2).sum(-1)) if quantity.is_norm else stacked.mean(-1)


@torch.no_grad()
def trace(model: TitansLM, tokens: Sequence[int], name: str) -> Trace:
    """Reads tokens as one text from its beginning. Raises UserError, which calls the model `name`, without a memory."""
    cores = memory_cores(model, name)
    kept: list[list[dict[str, Tensor]]] = [[] for _ in cores]
    with ExitStack() as hooks:
        for core, parts in zip(cores, kept, strict=True):
            hooks.callback(core.register_forward_hook(_keeping(parts)).remove)
        losses = token_losses(model, torch.tensor([list(tokens)], device=model.norm.weight.device))
    layers = [
        {quantity.name: torch.cat([part[quantity.name] for part in parts], 1)[0].cpu().numpy()
         for quantity in QUANTITIES} for parts in kept
    ]  # fmt: skip
    return Trace(layers, losses[0].cpu().numpy())


@torch.no_grad()
def token_losses(model: TitansLM, tokens: Tensor) -> Tensor:
    """-log p of every token [B, T] of rows that begin at the first, which has none: [B, T] in nats, nan there."""
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
    state, parts = None, []
    for piece, wanted in zip(tokens.split(PIECE, 1), targets.split(PIECE, 1), strict=True):
        losses, state = model.token_losses(piece, wanted, state)
        parts.append(losses)
    losses = torch.cat(parts, 1)
    return torch.cat([torch.full_like(losses[:, :1], torch.nan), losses[:, :-1]], 1)


def _keeping(parts: list[dict[str, Tensor]]) -> Any:
    """A hook that appends what a memory did with the tokens of a call."""

    def keep(core: nn.Module, arguments: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, write, state, *_ = arguments
        if write is None:  # the mac's reads before its attention, which write nothing
            return
        config = core.config
        options = MemoryOptions(
            config.chunk, config.activation, config.forget_to, config.objective, config.bound, core.scale
        )
        norms = token_norms(write.k, write.v, *write.gates, core.learned(), state, options)
        retrieval = output[0].float() if output[0].dtype != torch.float64 else output[0]
        parts.append({**norms._asdict(), **write.gates._asdict(), "retrieval": retrieval.norm(dim=-1)})

    return keep


@contextmanager
def writes_left_out(model: TitansLM, left_out: Tensor) -> Iterator[None]:
    """While it holds, tokens of a beginning's rows are read, but not written to any memory: their theta is 0.

    Forgetting and momentum go on at them, and so does all else that reads them: attention, convolutions.

    Args:
        left_out: [B, T] bool.
    """
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, GateProjection):
                hooks.callback(module.register_forward_hook(_Closing(left_out)).remove)
        yield


class _Closing:
    """A hook that sets the steps of one layer to 0; calls go on where the last one ended."""

    def __init__(self, left_out: Tensor) -> None:
        self._left_out = left_out
        self._read = 0

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], gates: Gates) -> Gates:
        start, self._read = self._read, self._read + gates.theta.shape[1]
        closed = self._left_out[:, start : self._read, None]
        return gates._replace(theta=gates.theta.masked_fill(closed, 0.0))
