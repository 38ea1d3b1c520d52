"""Hidden activations of the memory network and their vector-Jacobian products, from differentiable operations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.memory.options import Activation


def activate(z: Tensor, activation: Activation, scale: float) -> Tensor:
    """`scale * act(z)` over the last dimension. GELU is the exact one (by erf); softmax runs over the hidden width."""
    if activation == "silu":
        x = F.silu(z)
    elif activation == "gelu":
        x = F.gelu(z)
    else:
        x = torch.softmax(z, dim=-1)
    return x if scale == 1.0 else x * scale


def activate_vjp(z: Tensor, gradient: Tensor, activation: Activation, scale: float) -> Tensor:
    """Gradient with respect to z of `<scale * act(z), gradient>`; itself differentiable in z and gradient.

    Written out, not taken from autograd: it is a value of the forward pass (the memory learns by it), and the outer
    gradient goes through it once more.
    """
    if scale != 1.0:
        gradient = gradient * scale
    if activation == "silu":
        s = torch.sigmoid(z)
        return gradient * torch.addcmul(s, z * s, 1 - s)
    if activation == "gelu":
        density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
        cumulative = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        return gradient * torch.addcmul(cumulative, z, density)
    x = torch.softmax(z, dim=-1)
    return x * (gradient - (gradient * x).sum(dim=-1, keepdim=True))
