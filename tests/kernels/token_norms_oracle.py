"""What each token does to a memory, in norms, by forming every token's weights: slow, plain, any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kernels.memory.options import MemoryOptions
from kernels.memory.token_norms import TokenNorms


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Over all layers, [B, H]."""
    return sum(x.square().sum((-2, -1)) for x in tensors).sqrt()


def by_the_token(inputs: list[Tensor], weights: list[Tensor], options: MemoryOptions) -> TokenNorms:
    """The same norms from weights that are formed token by token, with a gradient by autograd of the plain loss."""
    _, k, v, alpha, eta, theta = inputs
    functions = {"silu": functional.silu, "gelu": functional.gelu, "softmax": lambda z: z.softmax(-1)}
    activation = functions[options.activation]
    current = [w.expand(k.shape[0], *w.shape).clone() for w in weights]
    anchors = [w if options.forget_to == "init" else torch.zeros_like(w) for w in weights]
    momentum = [torch.zeros_like(w) for w in current]
    found: list[list[Tensor]] = [[], [], []]
    for t in range(k.shape[1]):
        if t % options.chunk_size == 0:
            start, features = [w.clone().requires_grad_() for w in current], []
        x, inputs_here = k[:, t], []
        for layer, w in enumerate(start):
            inputs_here.append(x.detach())
            x = torch.einsum("bhi,bhio->bho", x, w)
            x = x if layer == len(start) - 1 else options.activation_scale * activation(x)
        loss = (x - v[:, t]).square().sum() if options.objective == "l2" else -(x * v[:, t]).sum()
        gradient = torch.autograd.grad(loss, start)
        features.append((inputs_here, theta[:, t] / (1 - eta[:, t])))
        old = list(current)
        for layer, u in enumerate(gradient):
            step = theta[:, t]
            if options.step_bound is not None:
                overlap = sum(c * (x[layer] * inputs_here[layer]).sum(-1).abs() for x, c in features)
                step = step / (options.step_bound * overlap).clamp_min(1.0)
            momentum[layer] = eta[:, t, :, None, None] * momentum[layer] - step[..., None, None] * u
            keep = 1 - alpha[:, t, :, None, None]
            current[layer] = anchors[layer] + keep * (current[layer] - anchors[layer]) + momentum[layer]
        change = [new - before for new, before in zip(current, old, strict=True)]
        for into, tensors in zip(found, (gradient, momentum, change), strict=True):
            into.append(norm(tensors))
    return TokenNorms(*(torch.stack(parts, 1) for parts in found))
