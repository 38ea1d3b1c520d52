"""Hidden activations of the memory network and their vector-Jacobian products, and the gradients of these.

In as few passes over the tensors as torch's fused operations allow; the derivatives that its autograd uses are such.
"""

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


def activate_into(out: Tensor, z: Tensor, activation: Activation, scale: float) -> None:
    """`activate` to a tensor that is there; outside differentiation, as all that follows."""
    if activation == "silu":
        torch.ops.aten.silu.out(z, out=out)
    elif activation == "gelu":
        torch.ops.aten.gelu.out(z, out=out)
    else:
        torch.softmax(z, dim=-1, out=out)
    if scale != 1.0:
        out.mul_(scale)


def activate_vjp(
    z: Tensor, gradient: Tensor, activation: Activation, scale: float, out: Tensor | None = None
) -> Tensor:
    """Gradient with respect to z of `<scale * act(z), gradient>`, to `out` (which may be `gradient`) or a new tensor.

    A value of the forward pass, since the memory learns by it; `activate_vjp_gradients` is its own gradient.
    """
    out = torch.empty_like(gradient) if out is None else out
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(gradient, z, grad_input=out)
    elif activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(gradient, z, grad_input=out)
    else:
        x = torch.softmax(z, dim=-1)
        torch.mul(x, gradient - (gradient * x).sum(dim=-1, keepdim=True), out=out)
    return out if scale == 1.0 else out.mul_(scale)


def activate_vjp_gradients(
    z: Tensor, gradient: Tensor, cotangent: Tensor, activation: Activation, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `<activate_vjp(z, gradient), cotangent>` with respect to z and gradient, in closed form."""
    cotangent = cotangent if scale == 1.0 else cotangent * scale
    if activation == "softmax":
        x = torch.softmax(z, dim=-1)
        centred = gradient - (gradient * x).sum(dim=-1, keepdim=True)
        mean = (cotangent * x).sum(dim=-1, keepdim=True)
        into_x = torch.addcmul(cotangent * centred, gradient, mean, value=-1)
        return x * (into_x - (into_x * x).sum(dim=-1, keepdim=True)), x * (cotangent - mean)
    both = cotangent * gradient
    if activation == "silu":
        # silu'' = s (1 - s) (2 + z (1 - 2 s)), s the sigmoid of z, whose derivative is s (1 - s).
        s = torch.sigmoid(z)
        both = torch.addcmul(both, both, torch.addcmul(z, z, s, value=-2), value=0.5)
        d_z = torch.ops.aten.sigmoid_backward(both, s).mul_(2)
    else:
        # gelu'' = density (2 - z^2).
        square = z * z
        density = torch.exp(-0.5 * square).mul_(1 / math.sqrt(2 * math.pi))
        d_z = torch.addcmul(both, both, square, value=-0.5).mul_(density).mul_(2)
    return d_z, activate_vjp(z, cotangent, activation, 1.0)
