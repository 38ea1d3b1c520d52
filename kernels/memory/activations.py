"""Hidden activations of the memory network and their vector-Jacobian products, and the gradients of these."""

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
    """Gradient with respect to z of `<scale * act(z), gradient>`.

    A value of the forward pass, since the memory learns by it; `activate_vjp_gradients` is its own gradient.
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


def activate_vjp_gradients(
    z: Tensor, gradient: Tensor, cotangent: Tensor, activation: Activation, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `<activate_vjp(z, gradient), cotangent>` with respect to z and gradient, in closed form."""
    if scale != 1.0:
        cotangent = cotangent * scale
    if activation == "softmax":
        x = torch.softmax(z, dim=-1)
        centred = gradient - (gradient * x).sum(dim=-1, keepdim=True)
        mean = (cotangent * x).sum(dim=-1, keepdim=True)
        into_x = torch.addcmul(cotangent * centred, gradient, mean, value=-1)
        return x * (into_x - (into_x * x).sum(dim=-1, keepdim=True)), x * (cotangent - mean)
    if activation == "silu":
        s = torch.sigmoid(z)
        slope = s * (1 - s)
        first = torch.addcmul(s, z, slope)
        second = slope * (2 + z * (1 - 2 * s))
    else:
        density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
        first = torch.addcmul(0.5 * (1 + torch.erf(z * math.sqrt(0.5))), z, density)
        second = density * (2 - z * z)
    return cotangent * gradient * second, cotangent * first
