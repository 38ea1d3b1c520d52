"""Rotary position phases, right at any position a sequence can reach."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rotary(NamedTuple):
    """Cosines and sines [B, T, head_dim / 2], fp32 (float64 for a float64 model); B is 1 when all rows stand alike."""

    cos: Tensor
    sin: Tensor

    def piece(self, start: int, stop: int) -> "Rotary":
        """The phases of tokens start..stop-1."""
        return Rotary(self.cos[:, start:stop], self.sin[:, start:stop])


def rotary_phases(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Rotary:
    """Phases for positions [B, T] int64.

    In float64: at position 2^21 an fp32 phase is off by tenths of a radian; a float64 one is good to 1e-6 at 2^31.

    Args:
        dtype: of the model; the result is fp32, or float64 for a float64 model.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.to(torch.float64)[..., None] * base**-exponents
    wide = torch.promote_types(dtype, torch.float32)
    return Rotary(angles.cos().to(wide), angles.sin().to(wide))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turns x [B, T, H, D] by its positions' phases; component i is paired with i + D/2. Computed in fp32 or better."""
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class Rotation(nn.Module):
    """`rotate` as a part of a model."""

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """As `rotate`."""
        return rotate(x, rotary)
