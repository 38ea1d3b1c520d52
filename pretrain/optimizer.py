"""AdamW, with weight decay on the matrices alone."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from model import TitansLM

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(BaseModel):
    """AdamW and the clipping before it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    lr: float = Field(default=4e-4, gt=0)
    """Peak learning rate; the schedule scales it."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second mean."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of the weight matrices; norms, biases, embeddings, persistent tokens and initial memories have none."""

    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest global norm of the gradient; 0 turns clipping off."""


def build_optimizer(model: TitansLM, config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over two groups: what decays (`model.decay_parameters()`) and what does not. The rate comes with each step.

    Raises ValueError when the model names a parameter to decay that it does not have.
    """
    decayed = model.decay_parameters()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if unknown := decayed - named.keys():
        raise ValueError(f"decay_parameters() names no trained parameter: {', '.join(sorted(unknown))}")
    groups = [
        {"params": [p for name, p in named.items() if name in decayed], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
    ]
    # On a GPU the fused step touches the state once and needs no temporary copies of it.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=device.type == "cuda")
