"""A session: what a model has read, as a file, so that a conversation goes on days later as if it had not stopped.

The file is safetensors: the tensors of `ModelState`, and the tokens that were chosen but not read yet. Its metadata
holds a format version, the number of tokens read, a fingerprint of the model, and the sha256 of all this. It is as
large after a million tokens as after a thousand, but for a transformer with full attention.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kernels.memory import MemoryState, neural_memory
from model import ModelState, TitansLM
from model.memory import MemoryCore
from model.state import LayerState, MemoryLayerState
from pretrain.durable import sync
from pretrain.errors import UserError
from tools.command import writing

FORMAT, VERSION = "mnemosyne-session", 1
_STATE, _UNREAD = "state.", "unread"


@dataclass(frozen=True)
class Session:
    """Where a conversation stands."""

    state: ModelState
    """Of one row or several."""
    unread: Tensor
    """[B, n] int64: tokens that were chosen or given and not read yet; the next call reads them first."""
    tokens: int
    """Tokens read so far."""


def fingerprint(model: TitansLM) -> str:
    """sha256 of a model's configuration and weights, in the precision that they have."""
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    _add_tensors(digest, dict(model.named_parameters()))
    return digest.hexdigest()


def save_session(path: Path, session: Session, model: TitansLM) -> None:
    """Writes the session, complete or not at all, over what was there; raises UserError where it can't."""
    tensors = {_STATE + name: tensor.cpu() for name, tensor in session.state.tensors().items()}
    tensors[_UNREAD] = session.unread.cpu().contiguous()
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "tokens": str(session.tokens),
        "model": fingerprint(model),
    }
    metadata["sha256"] = _digest(tensors, metadata)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            try:
                save_file(tensors, partial, metadata)
            except safetensors.SafetensorError as error:
                raise UserError(f"{path}: cannot be written: {error}") from error
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def load_session(path: Path, model: TitansLM) -> Session:
    """The session of a file, on the model's device.

    Raises:
        UserError: the file is missing, no session, of another version, altered, or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path}: is no session; give a file that `tools.generate --save-memory` wrote")
            if metadata.get("version") != str(VERSION):
                raise UserError(
                    f"{path}: is a session of format version {metadata.get('version')}; this program reads {VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --save-memory makes one") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as a session: {error}; it is cut or damaged") from None
    if metadata.get("sha256") != _digest(tensors, {k: v for k, v in metadata.items() if k != "sha256"}):
        raise UserError(f"{path}: was altered since it was saved (its sha256 differs); save it again")
    if metadata.get("model") != (own := fingerprint(model)):
        raise UserError(
            f"{path}: is a session of another model, or of this one in another --dtype (fingerprint "
            f"{str(metadata.get('model'))[:12]}, this one's {own[:12]}); a memory fits the model that made it alone"
        )
    device = model.norm.weight.device
    unread = tensors.pop(_UNREAD).to(device)
    state = ModelState.from_tensors({name.removeprefix(_STATE): tensor for name, tensor in tensors.items()})
    return Session(state.to(device), unread, int(metadata["tokens"]))


@torch.no_grad()
def merge_sessions(sessions: Sequence[Session], model: TitansLM, weights: Sequence[float] | None = None) -> Session:
    """One session whose memory knows something of several: an experiment, without a theory that it should work.

    Each memory is brought to the end of its open chunk; its change from W_0, and its momentum, are averaged by
    `weights` (default: equal), which are divided by their sum. Attention, convolutions and positions begin anew, and
    tokens that were not read are dropped.

    Raises:
        ValueError: no sessions, weights that don't fit them, sessions of several rows, or a model without a memory.
    """
    if not sessions:
        raise ValueError("there are no sessions to merge")
    given = [1.0] * len(sessions) if weights is None else list(weights)
    if len(given) != len(sessions) or not all(0 <= weight < float("inf") for weight in given) or not sum(given):
        raise ValueError(f"weights are {given}: they must be {len(sessions)} numbers of at least 0, not all 0")
    if model.config.memory is None:
        raise ValueError(f"the model's variant is {model.config.variant}, which has no memory to merge")
    if any(len(session.state.position) != 1 for session in sessions):
        raise ValueError("a session has several rows; those of one row can be merged")
    shares = [weight / sum(given) for weight in given]
    cores = [module for module in model.modules() if isinstance(module, MemoryCore)]
    layers = tuple(
        _merged_layer([session.state.layers[index] for session in sessions], shares, core)
        for index, core in enumerate(cores)
    )
    device = model.norm.weight.device
    unread = torch.empty(1, 0, dtype=torch.int64, device=device)
    start = model.initial_state(1)
    return Session(replace(start, layers=layers), unread, sum(session.tokens for session in sessions))


def _merged_layer(layers: Sequence[LayerState], shares: Sequence[float], core: MemoryCore) -> LayerState:
    ends = [at_end(layer.memory.memory, core) for layer in layers if layer.memory is not None]
    learned = core.learned()
    start = MemoryState.initial(learned, 1, ends[0].k.dtype)
    weights = tuple(
        w0 + sum(share * (end.weights[layer] - w0) for share, end in zip(shares, ends, strict=True))
        for layer, w0 in enumerate(start.weights)
    )
    momentum = tuple(
        sum(share * end.momentum[layer] for share, end in zip(shares, ends, strict=True))
        for layer in range(len(learned))
    )
    tails = tuple(torch.zeros_like(tail) for tail in layers[0].memory.tails)
    return LayerState(MemoryLayerState(replace(start, weights=weights, momentum=momentum), tails))


def at_end(memory: MemoryState, core: MemoryCore) -> MemoryState:
    """The memory after the tokens of its open chunk: as a chunk of just so many tokens leaves it."""
    if memory.num_open == 0:
        return memory
    tokens = (memory.k, memory.k, memory.v, memory.alpha, memory.eta, memory.theta)
    closed = replace(memory, **{name: getattr(memory, name)[:, :0] for name in ("k", "v", "alpha", "eta", "theta")})
    config = core.config
    _, end = neural_memory(
        *tokens, core.learned(), closed,
        chunk_size=memory.num_open, activation=config.activation, forget_to=config.forget_to,
        objective=config.objective, step_bound=config.bound, activation_scale=core.scale, backend=core.backend,
    )  # fmt: skip
    return end


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    _add_tensors(digest, tensors)
    return digest.hexdigest()


def _add_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
