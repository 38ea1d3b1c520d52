"""Training steps on one device without DeepSpeed, for machines that do not have it: the same arithmetic."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from model import TitansLM
from pretrain.optimizer import OptimizerConfig, build_optimizer


class PlainLoop:
    """Forward, backward, clipping and AdamW, as `parallel.engine.Engine` does them on one rank.

    With bf16 the weights that AdamW steps on are fp32, as are its moments and the gradients that it is given; the
    model's own weights are their bf16 copies.
    """

    def __init__(self, model: TitansLM, config: OptimizerConfig, device: torch.device, precision: str) -> None:
        """`precision`: "fp32" or "bf16"; the model is moved to the device, and to it."""
        masters = model.to(device)
        self.model = masters if precision == "fp32" else copy.deepcopy(masters).to(torch.bfloat16)
        own = [] if precision == "fp32" else self.model.parameters()
        self._masters, self._copies = list(masters.parameters()), list(own)
        self._clip = config.gradient_clip
        self._optimizer = build_optimizer(masters, config, device)

    def train_step(self, tokens: Tensor, targets: Tensor, learning_rate: float) -> Tensor:
        """One optimizer step on int64 [B, T]; the mean loss in nats, a 0-d tensor on the device."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self.model(tokens, targets=targets).loss_sum / targets.numel()
        loss.backward()
        for master, own in zip(self._masters, self._copies, strict=bool(self._copies)):
            master.grad, own.grad = own.grad.to(master.dtype), None
        nn.utils.clip_grad_norm_(self._masters, self._clip if self._clip > 0 else float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for master, own in zip(self._masters, self._copies, strict=bool(self._copies)):
                own.copy_(master)
        return loss.detach()
