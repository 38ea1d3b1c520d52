"""The small parts of a block: normalisation, feed-forward, causal convolution, initialisation."""

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from kernels.token_maps import causal_convolution, head_norm, in_pieces, unit, unit_silu

READ_NORM_EPS = 1e-2
"""Inside the root of the norms that a memory's reads pass through.

Reads start near zero, as the memory's last layer does, and a norm multiplies the gradients of small inputs by up to
eps^-0.5. Measured at the start of a mac and a mag of 4 layers of width 768: with 1e-3 in the heads' norm, 1e-6 in the
join's, the gradient's norm is 23 and 42, nearly all of it W_0's; with 1e-2 in both it is 7 and 7, spread evenly.
"""


def linear(fan_in: int, fan_out: int, scale: float = 1.0) -> nn.Linear:
    """A linear map without bias, N(0, 2 / (5 fan_in)) times `scale`: 0.023 at width 768, 0.020 at 1024.

    The small initialisation of Nguyen and Salazar (arXiv 1910.05895); maps that end a residual branch are scaled down.
    """
    layer = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(layer.weight, std=scale * (2 / (5 * fan_in)) ** 0.5)
    return layer


def residual_scale(branches: int) -> float:
    """Initial scale of each of `branches` residual branches, so that their sum keeps the size of one."""
    return branches**-0.5


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis with a learned weight, in fp32 or better."""

    def __init__(self, dim: int, eps: float, initial: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., dim], the same dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


class HeadNorm(nn.Module):
    """RMSNorm over each head's width, with weights of its own for every head."""

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, D] to [B, T, H, D], the same dtype."""
        if in_pieces(x, self.weight):
            return head_norm(x, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return (rms_norm(x.to(wide), x.shape[-1:], None, self.eps) * self.weight.to(wide)).to(x.dtype)


class GatedSilu(nn.Module):
    """`SiLU(gate) * up`."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Two tensors of one shape to a third."""
        return silu(gate) * up


class UnitSilu(nn.Module):
    """SiLU, heads apart, and division by the l2 norm of each by choice."""

    def __init__(self, num_heads: int, normalize: bool) -> None:
        super().__init__()
        self.num_heads, self.normalize = num_heads, normalize

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] to [B, T, H, D]."""
        if self.normalize and in_pieces(x):
            return unit_silu(x, self.num_heads)
        heads = silu(x).unflatten(-1, (self.num_heads, -1))
        return unit(heads) if self.normalize else heads


class SwiGLU(nn.Module):
    """Feed-forward `down(SiLU(gate x) * up x)` (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.entry = nn.Identity()
        """What the layer's maps read passes here, each tensor once: a place to act on all of their gradients."""
        self.gate = linear(dim, hidden)
        self.up = linear(dim, hidden)
        self.down = linear(hidden, dim, scale)
        self.activation = GatedSilu()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] to [B, T, dim]."""
        x = self.entry(x)
        return self.down(self.activation(self.gate(x), self.up(x)))


class CausalConvolution(nn.Module):
    """Depthwise convolution that sees the current token and the `width - 1` before it.

    Starts from U(-width^-0.5, width^-0.5), torch's default for a depthwise convolution.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.own = slice(None)
        """The channels that x holds, of those that there are weights for."""
        self.weight = nn.Parameter(torch.empty(width, channels).uniform_(-(width**-0.5), width**-0.5))

    def forward(
        self, x: Tensor, tail: Tensor | None, begins: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolves x [B, T, C] after `tail` [B, width - 1, C], the inputs before it (None: zeros).

        Args:
            begins: [B, T] int64, the index before which each token sees zeros (see model.resets); None: it sees all.
            weight: in the place of its own.

        Returns:
            [B, T, C], and the tail for what follows.
        """
        if tail is None:
            tail = x.new_zeros(x.shape[0], self.width - 1, x.shape[2])
        padded = torch.cat((tail.to(x.dtype), x), 1)  # of a state that another precision left
        length = x.shape[1]

        def seen(offset: int) -> Tensor:
            """What each token sees `width - 1 - offset` tokens back."""
            return _cleared_before(padded[:, offset : offset + length], offset - self.width + 1, begins)

        weight = (self.weight if weight is None else weight)[:, self.own]
        if begins is None and in_pieces(padded, weight):
            out = causal_convolution(padded, weight)
        else:
            out = seen(0) * weight[0]
            for offset in range(1, self.width):
                out = torch.addcmul(out, seen(offset), weight[offset])
        # A copy: a view would keep the whole piece alive for three tokens.
        tail = padded[:, length:].clone()
        return out, _cleared_before(tail, length - self.width + 1, None if begins is None else begins[:, -1:])


def _cleared_before(x: Tensor, first: int, begins: Tensor | None) -> Tensor:
    """x [B, n, C] of the tokens `first` and on, with zeros for those before `begins` [B, n or 1]."""
    if begins is None:
        return x
    index = torch.arange(first, first + x.shape[1], device=x.device)
    return x.masked_fill((index < begins)[..., None], 0)
