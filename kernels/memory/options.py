"""The options that define what a neural memory computes; they belong to the model, never to a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Activation = Literal["silu", "gelu", "softmax"]
ForgetTo = Literal["init", "zero"]
Objective = Literal["l2", "dot"]

MAX_DEPTH = 4

# c_j = theta_j / (1 - eta_j) in the step bound: eta = 1 is legal (a token that changes nothing), so it has a floor.
MIN_ONE_MINUS_ETA = 1e-6


@dataclass(frozen=True)
class MemoryOptions:
    """What `neural_memory` computes, apart from its tensors. See `neural_memory` for the meaning of each field."""

    chunk_size: int
    activation: Activation = "silu"
    forget_to: ForgetTo = "init"
    objective: Objective = "l2"
    step_bound: float | None = None
    activation_scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise ValueError(f"chunk_size is {self.chunk_size!r}; it must be a whole number of tokens, 1 or more")
        for field, allowed in (("activation", Activation), ("forget_to", ForgetTo), ("objective", Objective)):
            value = getattr(self, field)
            if value not in get_args(allowed):
                raise ValueError(f"{field} is {value!r}; it must be one of {', '.join(get_args(allowed))}")
        if self.step_bound is not None and not self.step_bound > 0:
            raise ValueError(f"step_bound is {self.step_bound!r}; it must be positive, or None for unbounded steps")
