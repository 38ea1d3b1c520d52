"""The per-token recurrence of the neural memory with autograd: the oracle. Slow, plain, any dtype; not for training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.memory.options import MIN_ONE_MINUS_ETA, MemoryOptions
from kernels.memory.state import MemoryState


def _layer_inputs(x: Tensor, weights: Sequence[Tensor], options: MemoryOptions) -> list[Tensor]:
    """Inputs of every layer, then the output, of the memory for one token: x [B, H, D], weights [B, H, i, o]."""
    functions = {"silu": F.silu, "gelu": F.gelu, "softmax": lambda z: F.softmax(z, dim=-1)}
    values = [x]
    for layer, weight in enumerate(weights):
        x = torch.einsum("bhi,bhio->bho", x, weight)
        if layer < len(weights) - 1:
            x = functions[options.activation](x) * options.activation_scale
        values.append(x)
    return values


def _inner_gradient(k: Tensor, v: Tensor, weights: Sequence[Tensor], options: MemoryOptions) -> tuple[Tensor, ...]:
    """u_t: gradient of one token's inner objective with respect to the memory's weights (paper, equations 8, 12)."""
    with torch.enable_grad():
        weights = [w if w.requires_grad else w.detach().requires_grad_() for w in weights]
        prediction = _layer_inputs(k, weights, options)[-1]
        loss = (prediction - v).square().sum() if options.objective == "l2" else -(prediction * v).sum()
        return torch.autograd.grad(loss, weights, create_graph=True)


def neural_memory_reference(
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
) -> tuple[Tensor, MemoryState]:
    """What `neural_memory` must give, one token at a time (README.md, section 1; paper, equations 9, 10, 13, 14).

    Arguments, shapes and result are those of `neural_memory`. Every step's weights stay alive in the autograd graph, so
    memory grows with T times the weights. Works in the dtype of its inputs.
    """
    options = MemoryOptions(chunk_size, activation, forget_to, objective, step_bound, activation_scale)
    state = state or MemoryState.initial(weights, q.shape[0], k.dtype)
    num_open = state.num_open
    k, v = torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1)
    alpha, eta = torch.cat([state.alpha, alpha], dim=1), torch.cat([state.eta, eta], dim=1)
    theta = torch.cat([state.theta, theta], dim=1)

    current, momentum = list(state.weights), list(state.momentum)
    start, start_momentum, seen = list(current), list(momentum), []
    outputs = []
    for t in range(k.shape[1]):
        if t % chunk_size == 0:
            start, start_momentum, seen = list(current), list(momentum), []
        gradient = _inner_gradient(k[:, t], v[:, t], start, options)
        inputs = _layer_inputs(k[:, t], start, options)
        scale = theta[:, t] / (1 - eta[:, t]).clamp_min(MIN_ONE_MINUS_ETA)
        seen.append((inputs, scale))
        for layer, w0 in enumerate(weights):
            step = theta[:, t]
            if step_bound is not None:
                overlap = sum(c * (x[layer] * inputs[layer]).sum(-1).abs() for x, c in seen)
                step = step / (step_bound * overlap).clamp_min(1.0)
            keep = (1 - alpha[:, t])[..., None, None]
            momentum[layer] = eta[:, t, :, None, None] * momentum[layer] - step[..., None, None] * gradient[layer]
            anchor = w0 if forget_to == "init" else torch.zeros_like(w0)
            current[layer] = anchor + keep * (current[layer] - anchor) + momentum[layer]
        if t >= num_open:
            outputs.append(_layer_inputs(q[:, t - num_open], current, options)[-1])

    rest = k.shape[1] % chunk_size
    if rest == 0:
        start, start_momentum = current, momentum
    tail = k.shape[1] - rest
    end = MemoryState(tuple(start), tuple(start_momentum), *(x[:, tail:] for x in (k, v, alpha, eta, theta)))
    return torch.stack(outputs, dim=1), end
