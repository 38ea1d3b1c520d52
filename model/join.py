"""Where attention and memory meet in the mac and the mag."""

from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import READ_NORM_EPS, RMSNorm, linear


class Join(nn.Module):
    """Joins attention y and memory m after a learned normalisation of each.

    `sum`: norm(y) * sigmoid(G_y x) + norm(m) * sigmoid(G_m x). `product`: norm(y) * sigmoid(norm(m)), the paper's
    letter (sections 4.1 and 4.2). The weights of the norms start at `scale`, the size of a residual branch.
    """

    def __init__(self, config: ModelConfig, scale: float) -> None:
        super().__init__()
        product = config.join == "product"
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, scale)
        self.memory_norm = RMSNorm(config.dim, READ_NORM_EPS, 1.0 if product else scale)
        self.attention_gate = None if product else linear(config.dim, config.dim)
        self.memory_gate = None if product else linear(config.dim, config.dim)

    def forward(self, y: Tensor, m: Tensor, x: Tensor) -> Tensor:
        """y, m and the tokens x, [B, T, dim] each, to [B, T, dim]."""
        y, m = self.attention_norm(y), self.memory_norm(m)
        if self.attention_gate is None:
            return y * m.sigmoid()
        return y * self.attention_gate(x).sigmoid() + m * self.memory_gate(x).sigmoid()
