"""How a run is spread over processes and devices."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ParallelConfig(BaseModel):
    """Layout and precision. What it leads to in DeepSpeed's own terms is derived in one place, `deepspeed_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What each rank keeps only its share of: 0 nothing, 1 the optimizer's state, 2 the gradients too, 3 the
    parameters too.
    """

    precision: Literal["fp32", "bf16"] = "bf16"
    """What the model computes in. With bf16 the master weights, the optimizer's state and the summed gradients
    stay fp32.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What to compute on; auto takes this rank's GPU where there is one."""

    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations: less memory, about a third
    more compute.
    """

    attention_backend: Literal["auto", "flash", "varlen", "flex", "sdpa", "math"] = "auto"
    """What computes the attention: flash-attn, torch's kernels for packed sequences, FlexAttention, scaled-dot-product
    kernels, or the plain formula. auto takes the first that can and that agrees with the formula on this GPU. It
    changes speed and memory; what is learned differs by rounding alone.
    """

    memory_backend: Literal["auto", "dual", "triton"] = "auto"
    """What computes the memories: the dual form in PyTorch, or the Triton kernels, which on a GPU are tested first and
    replaced by the dual form, with a warning, where they disagree with it. auto is the dual form, until the kernels
    have been run on a GPU. What is learned differs by rounding alone.
    """

    compile: bool = False
    """Fuse the small operations between the matrix products (norms, activations, convolutions, rotary phases, gates)
    by torch.compile: fewer passes over memory, but compiling at the start. What is learned differs by
    rounding alone.
    """

    reduce_gradients: Literal["step", "backward"] = "step"
    """ZeRO 2 and 3, where a step has several backward passes (micro-batches, and segments of each): when gradients are
    summed over ranks. step: once, behind the last pass; until then every rank holds the whole gradient in fp32, 4 bytes
    for each parameter of the model, so that ZeRO 2 holds what 1 does. backward: behind every pass, and each rank holds
    its share alone: less memory for as many times the traffic.
    """

    bucket_elements: int = Field(default=100_000_000, ge=1)
    """Gradients are reduced in buckets of this many elements; larger ones use the network better and take more
    memory.
    """

    gather_ahead_elements: int = Field(default=100_000_000, ge=1)
    """ZeRO 3: how many parameter elements may be gathered ahead of their use."""

    keep_gathered_below: int = Field(default=10_000, ge=0)
    """ZeRO 3: parameters with fewer elements than this stay whole on every rank."""

    timeout_minutes: float = Field(default=30.0, gt=0)
    """A collective that waits longer than this for a lost rank ends the job."""

    deterministic: bool = False
    """Use only deterministic kernels, so that two runs on GPUs are bitwise equal; slower. On CPU they are equal
    anyway.
    """

    @model_validator(mode="after")
    def _bf16_needs_a_partitioned_optimizer(self) -> ParallelConfig:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "zero_stage 0 with precision bf16 would sum gradients and step in bfloat16; use zero_stage 1 or more "
                "(on one process it costs nothing), or precision fp32"
            )
        return self

    @model_validator(mode="after")
    def _shares_of_gradients_begin_at_stage_2(self) -> ParallelConfig:
        if self.reduce_gradients == "backward" and self.zero_stage < 2:
            raise ValueError(
                f"reduce_gradients is backward, but zero_stage {self.zero_stage} keeps gradients whole and sums them "
                "once a step; remove it, or use zero_stage 2 or 3"
            )
        return self

    @model_validator(mode="after")
    def _gathering_belongs_to_stage_3(self) -> ParallelConfig:
        for name in ("gather_ahead_elements", "keep_gathered_below"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.zero_stage != 3 and value != default:
                raise ValueError(
                    f"{name} is {value}, but only zero_stage 3 gathers parameters, and zero_stage is "
                    f"{self.zero_stage}; remove it"
                )
        return self

    def keeps_gradients_whole(self, backward_passes: int) -> bool:
        """Whether each rank holds the gradients of all parameters through a step of so many backward passes."""
        return self.zero_stage < 2 or (self.reduce_gradients == "step" and backward_passes > 1)
