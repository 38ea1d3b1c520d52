"""Forgetting, momentum and step of every token and head."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kernels.autocast import outside_autocast
from model.config import MemoryConfig


class Gates(NamedTuple):
    """[B, T, H] each, fp32 (float64 for a float64 model)."""

    alpha: Tensor
    eta: Tensor
    theta: Tensor


class GateProjection(nn.Module):
    """alpha = sigmoid, eta = sigmoid, theta = c (1 - eta) with c = step_ceiling * sigmoid, of linears of x per head.

    The configured starting values are fixed offsets, and weights and biases start at zero: every token starts from
    exactly those values, and none of their bits go to a bf16 parameter. A gate that is switched off has no parameters.
    """

    def __init__(self, dim: int, num_heads: int, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        starts = {"step": config.initial_step / config.step_ceiling}
        if config.momentum:
            starts["eta"] = config.initial_momentum
        if config.forgetting:
            starts["alpha"] = config.initial_forgetting
        self.offsets = {name: math.log(start / (1 - start)) for name, start in starts.items()}
        self.weight = nn.Parameter(torch.zeros(len(starts) * num_heads, dim))
        self.bias = nn.Parameter(torch.zeros(len(starts) * num_heads))

    def forward(self, x: Tensor) -> Gates:
        """x [B, T, dim] to gates, computed in fp32 or better."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = outside_autocast(linear)(x.to(wide), self.weight.to(wide), self.bias.to(wide))
        logits = logits.unflatten(-1, (-1, self.num_heads))
        squashed = {
            name: (logits[..., index, :] + offset).sigmoid()
            for index, (name, offset) in enumerate(self.offsets.items())
        }
        step = self.config.step_ceiling * squashed["step"]
        nothing = torch.zeros_like(step)
        eta = squashed.get("eta", nothing)
        return Gates(alpha=squashed.get("alpha", nothing), eta=eta, theta=step * (1 - eta))
