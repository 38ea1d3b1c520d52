"""How a run is spread over processes and devices."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from parallel.mesh import Layout


class ParallelConfig(BaseModel):
    """Layout and precision. What it leads to in DeepSpeed's own terms is derived in one place, `deepspeed_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    tensor: int = Field(default=1, ge=1)
    """Ranks that share every layer: each takes some heads of attention and memory, some columns of the feed-forward,
    and some rows of the embedding. They talk several times a layer, so keep them on one node.
    """

    tensor_shard_norms: bool = False
    """Tensor ranks divide the residual stream and what norms take by tokens, instead of each holding all of it
    (Megatron-LM's sequence parallelism): less memory for activations, for as much traffic. Lengths must be multiples of
    tensor x sequence.
    """

    pipeline: int = Field(default=1, ge=1)
    """Stages that the layers are divided over. Micro-batches, or the segments of long rows, follow each other through
    them; each stage stands idle (stages - 1) / (micro-batches x segments) of the time that it works.
    """

    balance_stages: Literal["flops", "parameters"] = "flops"
    """What stages have about as much of each: operations, so that none waits for another, or parameters."""

    sequence: int = Field(default=1, ge=1)
    """Ranks that share every row of tokens: each takes a stretch of it, and for attention and memory all tokens of some
    heads. Ranks that the three leave, as many as start over their product, are data-parallel.
    """

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

    offload_optimizer: bool = False
    """ZeRO 3: keep this rank's share of the optimizer's state and of the fp32 weights in the host's memory, and take
    the step there: 12 bytes for each parameter of the share less on the device, for a slower step.
    """

    offload_parameters: bool = False
    """Beside that, keep the parameters' shares in the host's memory too, and bring each layer's to the device for its
    use.
    """

    gather_ahead_elements: int = Field(default=100_000_000, ge=1)
    """ZeRO 3: how many parameter elements may be gathered ahead of their use."""

    keep_gathered_below: int = Field(default=10_000, ge=0)
    """ZeRO 3: parameters with fewer elements than this stay whole on every rank."""

    timeout_minutes: float = Field(default=30.0, gt=0)
    """A collective that waits longer than this for a lost rank ends the job."""

    step_timeout_seconds: float = Field(default=1200.0, gt=0)
    """A step, a batch of an evaluation, or a checkpoint that takes longer than this ends the job with exit code 124,
    the stacks of every rank printed: something hangs. Set it above the slowest of them, a first step that compiles
    included.
    """

    startup_timeout_seconds: float = Field(default=1800.0, gt=0)
    """The same for what stands before the first step and between phases: joining the other ranks, choosing and reading
    a checkpoint, building the model. Each of them may take so long; reading through the data that data.verify asks for
    takes what it takes.
    """

    deterministic: bool = False
    """Use only deterministic kernels, so that two runs on GPUs are bitwise equal; slower. On CPU they are equal
    anyway.
    """

    def layout(self, ranks: int) -> Layout:
        """How so many ranks are laid out. Raises ValueError where they can't be."""
        return Layout.of(ranks, pipeline=self.pipeline, sequence=self.sequence, tensor=self.tensor)

    @property
    def stretches(self) -> int:
        """How many stretches the ranks divide a row's tokens into between layers."""
        return self.sequence * (self.tensor if self.tensor_shard_norms else 1)

    @model_validator(mode="after")
    def _norms_are_sharded_over_tensor_ranks(self) -> ParallelConfig:
        if self.tensor_shard_norms and self.tensor == 1:
            raise ValueError(
                "tensor_shard_norms is true, but tensor is 1: there are no ranks to divide norms over; remove it, or "
                "set tensor to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _bf16_needs_a_partitioned_optimizer(self) -> ParallelConfig:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "zero_stage 0 with precision bf16 would sum gradients and step in bfloat16; use zero_stage 1 or more "
                "(on one process it costs nothing), or precision fp32"
            )
        return self

    @model_validator(mode="after")
    def _what_is_kept_on_the_host_is_a_share(self) -> ParallelConfig:
        if self.offload_optimizer and self.zero_stage != 3:
            raise ValueError(
                f"offload_optimizer is true with zero_stage {self.zero_stage}: on the host, DeepSpeed's stages 1 and 2 "
                "sum the gradients of micro-batches in bf16, and do not recover from one that is not finite; use "
                "zero_stage 3, or remove it"
            )
        if self.offload_parameters and not self.offload_optimizer:
            raise ValueError(
                "offload_parameters is true, but offload_optimizer is false: the optimizer's state, which is larger "
                "and used once a step, goes to the host before the parameters; set both, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _stages_keep_their_gradients(self) -> ParallelConfig:
        if self.pipeline > 1 and self.zero_stage > 1:
            raise ValueError(
                f"zero_stage {self.zero_stage} with pipeline {self.pipeline} would reduce every parameter's gradient "
                "for every micro-batch in flight, and DeepSpeed's pipeline refuses it; use zero_stage 1, or pipeline 1"
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
    def _balance_belongs_to_stages(self) -> ParallelConfig:
        if self.pipeline == 1 and self.balance_stages != "flops":
            raise ValueError(
                f"balance_stages is {self.balance_stages}, but pipeline is 1: there is one stage; remove it"
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

    def sums_beside_backward(self, backward_passes: int) -> bool:
        """Whether GPUs sum gradients over ranks while the backward pass, of so many in a step, goes on."""
        if self.zero_stage == 0 or self.pipeline > 1:
            return False
        return backward_passes == 1 or self.reduce_gradients == "backward"
