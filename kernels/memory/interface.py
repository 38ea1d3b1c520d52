"""`neural_memory`: the one entry for every backend; checks shapes, chooses the backend, never changes the semantics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.autocast import outside_autocast
from kernels.memory.activations import activate
from kernels.memory.choice import BACKENDS as CHOICES
from kernels.memory.choice import choose
from kernels.memory.dual import neural_memory_dual
from kernels.memory.options import MAX_DEPTH, MemoryOptions
from kernels.memory.problem import Problem
from kernels.memory.reference import neural_memory_reference
from kernels.memory.state import MemoryState, state_dtype

BACKENDS = (*CHOICES, "reference")


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    weights: Sequence[Tensor],
    state: MemoryState | None = None,
    *,
    chunk_size: int,
    activation: str = "silu",
    forget_to: str = "init",
    objective: str = "l2",
    step_bound: float | None = None,
    activation_scale: float = 1.0,
    backend: str = "auto",
    return_surprise: bool = False,
) -> tuple[Tensor, MemoryState] | tuple[Tensor, MemoryState, Tensor]:
    """The deep memory of Titans, learned at test time with momentum and forgetting (paper, equations 8 to 15).

    For each row and head a network `M(x) = W_L act(... act(x W_1))` is trained token by token: with u_t the gradient of
    `||M(k_t) - v_t||^2` at the weights of the chunk's start, `S_t = eta_t S_{t-1} - theta_t u_t`,
    `W_t = (1 - alpha_t) W_{t-1} + S_t`, and `y_t = M(q_t; W_t)` sees the writes of tokens 1..t exactly.
    Every input has its exact gradient, through the inner gradients too. Gradients of gradients are those of backend
    "reference"; elsewhere first derivatives may be taken with `create_graph=True`, and going back through them is an
    error.

    Args:
        q, k, v: [B, T, H, D], T >= 1.
        alpha, eta, theta: [B, T, H]: forgetting and momentum in [0, 1], both ends legal; step >= 0.
        weights: W_0, L = 1..4 tensors [H, d_in, d_out]; the first d_in and the last d_out are D.
        state: where an earlier piece of the sequence ended; None for a beginning.
        chunk_size: tokens whose gradients are taken at the same weights. A property of the model.
        activation: "silu", "gelu" (exact) or "softmax" (over the hidden width), after every layer but the last.
        forget_to: "init" forgets towards W_0, "zero" towards nothing, as the paper writes it.
        objective: "l2" as above, or "dot", `-<M(k), v>`: linear attention when L is 1.
        step_bound: b: each layer's step is divided by `max(1, b * sum_j c_j |x_j . x_t|)` over the chunk's
            tokens j <= t, with x the layer's inputs at the chunk's start and `c = theta / (1 - eta)`; None for plain
            steps.
        activation_scale: multiplies every hidden activation.
        backend: "dual" (the chunked dual form in PyTorch), "triton" (the same in Triton kernels, on a GPU where they
            pass their self-test there, with a warning the dual form where not), "reference" (the oracle), or "auto":
            the dual form, until the kernels have been run on a GPU. `explain_backend` says which and why.
        return_surprise: also return the norm of u_t for each token.

    Returns:
        y [B, T, H, D] in q's dtype; the state after the last token (weights and momentum fp32, or float64 for float64
        inputs); and, if asked for, surprise [B, T, H], outside differentiation.

    Raises:
        ValueError: for shapes that don't fit together, options that don't exist, or a memory that the backend asked
            for does not take; the message names the argument.
        RuntimeError: in the backward of a second derivative, but of backend "reference".
    """
    options = MemoryOptions(chunk_size, activation, forget_to, objective, step_bound, activation_scale)
    _check_shapes(q, k, v, (alpha, eta, theta), weights, state, options)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if state is None:
        state = MemoryState.initial(weights, q.shape[0], k.dtype)
    if backend == "reference":
        if return_surprise:
            raise ValueError("return_surprise is not offered by backend 'reference'; use 'dual'")
        return neural_memory_reference(
            q, k, v, alpha, eta, theta, weights, state,
            chunk_size=chunk_size, activation=activation, forget_to=forget_to, objective=objective,
            step_bound=step_bound, activation_scale=activation_scale,
        )  # fmt: skip
    chosen = choose(Problem.of(q, k, v, weights, options), backend).backend
    y, state, surprise = neural_memory_dual(
        q, k, v, alpha, eta, theta, weights, state, options, return_surprise, chosen
    )
    return (y, state, surprise) if return_surprise else (y, state)


def explain_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    *,
    chunk_size: int,
    activation: str = "silu",
    forget_to: str = "init",
    objective: str = "l2",
    step_bound: float | None = None,
    activation_scale: float = 1.0,
    backend: str = "auto",
) -> str:
    """What computes a call of `neural_memory` with these arguments, and why: "dual: the tensors ...".

    Raises:
        ValueError: there is no such backend to choose ("reference" chooses nothing), or it does not take this memory;
            the message says why.
    """
    options = MemoryOptions(chunk_size, activation, forget_to, objective, step_bound, activation_scale)
    choice = choose(Problem.of(q, k, v, weights, options), backend)
    return f"{choice.backend.name}: {choice.reason}"


@outside_autocast
def memory_read(
    q: Tensor, weights: Sequence[Tensor], *, activation: str = "silu", activation_scale: float = 1.0
) -> Tensor:
    """`M(q; W)` with fixed weights: a read without a write (the MAC's h, paper equation 21).

    Args:
        q: [B, T, H, D].
        weights: L tensors, [H, d_in, d_out] for all rows or [B, H, d_in, d_out] for each row.
        activation, activation_scale: as in `neural_memory`.

    Returns:
        [B, T, H, D] in q's dtype.
    """
    x = state_dtype(q).transpose(1, 2)
    for layer, weight in enumerate(weights):
        x = x @ state_dtype(weight)
        if layer < len(weights) - 1:
            x = activate(x, activation, activation_scale)
    return x.transpose(1, 2).to(q.dtype)


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: MemoryState | None,
    options: MemoryOptions,
) -> None:
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q is {list(q.shape)}; it must be [B, T, H, D] with at least one token")
    for name, x, shape in (
        ("k", k, q.shape), ("v", v, q.shape), *zip(("alpha", "eta", "theta"), gates, (q.shape[:3],) * 3, strict=True)
    ):  # fmt: skip
        if x.shape != shape:
            raise ValueError(f"{name} is {list(x.shape)}; with q {list(q.shape)} it must be {list(shape)}")
    if not 1 <= len(weights) <= MAX_DEPTH:
        raise ValueError(f"weights has {len(weights)} layers; a memory has 1 to {MAX_DEPTH}")
    batch, _, heads, dim = q.shape
    width = dim
    for layer, w in enumerate(weights):
        if w.dim() != 3 or w.shape[0] != heads or w.shape[1] != width:
            raise ValueError(f"weights[{layer}] is {list(w.shape)}; it must be [{heads}, {width}, d_out]")
        width = w.shape[2]
    if width != dim:
        raise ValueError(f"weights[{len(weights) - 1}] has d_out {width}; the last layer's must be D = {dim}")
    if state is not None:
        expected = [torch.Size((batch, *w.shape)) for w in weights]
        found = [w.shape for w in state.weights]
        if found != expected:
            raise ValueError(
                f"state.weights has shapes {[list(s) for s in found]}; with these inputs and weights they must be "
                f"{[list(s) for s in expected]}: the state belongs to another batch or model"
            )
        if state.num_open >= options.chunk_size:
            raise ValueError(
                f"state holds {state.num_open} open tokens, chunk_size is {options.chunk_size}: "
                "the state was made with another chunk size"
            )
