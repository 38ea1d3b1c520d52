"""What a Titans language model is made of: every choice that its weights depend on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.presets import preset_fields

Variant = Literal["mac", "mag", "mal", "lmm", "transformer"]
_MAX_DEPTH = 4
_BOUND_MARGIN = 1.25
"""Over the harmonic number of the chunk, where like keys begin to diverge (kernels/memory/README.md, section 3)."""


class MemoryConfig(BaseModel):
    """The neural memory of a layer (Titans, arXiv 2501.00663, section 3; decisions in model/FIDELITY.md)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    depth: int = Field(default=2, ge=1, le=_MAX_DEPTH)
    """Layers of the memory network, 1 (a matrix) to 4."""
    expansion: int = Field(default=2, ge=1)
    """Hidden width of the memory network in head widths; unused at depth 1."""
    chunk: int = Field(default=64, ge=1)
    """Tokens whose inner gradients are taken at the same weights; a property of the model, as its weights are."""
    activation: Literal["silu", "gelu", "softmax"] = "silu"
    """Activation between the memory network's layers."""
    objective: Literal["l2", "dot"] = "l2"
    """Inner loss: squared error, or the dot product of linear attention."""
    forget_to: Literal["init", "zero"] = "init"
    """What forgetting decays towards: the learned initial weights, or nothing (the paper's letter)."""
    momentum: bool = True
    """Whether past surprise carries over; without it eta is 0 and theta the whole step."""
    forgetting: bool = True
    """Whether the memory forgets; without it alpha is 0."""
    parametrisation: Literal["unit", "standard"] = "unit"
    """Initial memory network: unit-norm features with a last layer of zeros, or N(0, 1/d_in) in every layer."""
    step_bound: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Bound b on the steps from the chunk's Gram matrix: stable above 1 + 1/2 + ... + 1/chunk (auto: 1.25 times that);
    none for the paper's plain steps."""
    step_ceiling: float = Field(default=1.0, gt=0)
    """Largest step c = theta / (1 - eta) that the gate can ask for."""
    initial_step: float = Field(default=0.12, gt=0)
    """Step c that the gate starts from; below step_ceiling."""
    initial_momentum: float = Field(default=0.9, gt=0, lt=1)
    """Momentum eta that the gate starts from."""
    initial_forgetting: float = Field(default=0.005, gt=0, lt=1)
    """Forgetting alpha that the gate starts from."""
    convolution: int = Field(default=4, ge=0)
    """Width in tokens of the causal depthwise convolutions on queries, keys and values; 0 for none."""
    normalize_values: bool = True
    """Whether values are divided by their l2 norm, as queries and keys always are (not in the paper)."""

    @property
    def bound(self) -> float | None:
        """The number that `step_bound` stands for."""
        if self.step_bound != "auto":
            return self.step_bound
        return _BOUND_MARGIN * sum(1 / n for n in range(1, self.chunk + 1))

    @model_validator(mode="after")
    def _check(self) -> MemoryConfig:
        if self.initial_step >= self.step_ceiling:
            raise ValueError(
                f"memory.initial_step is {self.initial_step}, memory.step_ceiling {self.step_ceiling}: "
                "the step starts below its ceiling; lower one or raise the other"
            )
        if self.convolution == 1:
            raise ValueError("memory.convolution is 1, a window of the token alone: give 2 or more, or 0 for none")
        if self.depth == 1:
            self._refuse_unused("memory.depth is 1, a matrix without hidden layers", "expansion", "activation")
        if not self.momentum:
            self._refuse_unused("memory.momentum is false", "initial_momentum")
        if not self.forgetting:
            self._refuse_unused("memory.forgetting is false", "initial_forgetting", "forget_to")
        return self

    def _refuse_unused(self, why: str, *names: str) -> None:
        # A field at its default may come from a configuration that was written out whole.
        for name in names:
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"memory.{name} is {value}, but {why}: it has no effect; remove it")


class ModelConfig(BaseModel):
    """A Titans language model. Build one from a preset: `ModelConfig.preset("mac-340m", vocab_size=50000)`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    variant: Variant
    """Mixer of each block: mac, mag, mal (memory with attention), lmm (memory alone), transformer (attention alone)."""
    vocab_size: int = Field(ge=2)
    """Number of tokens in the vocabulary."""
    dim: int = Field(ge=1)
    """Width of the model."""
    num_layers: int = Field(ge=1)
    """Number of blocks."""
    num_heads: int = Field(ge=1)
    """Heads of the attention and of the memory; dim / num_heads is the head's width."""
    ffn_dim: int = Field(ge=1)
    """Hidden width of the SwiGLU feed-forward."""
    segment: int | None = Field(default=None, ge=1)
    """mac: tokens of a segment, a multiple of memory.chunk; attention sees the running segment only."""
    window: int | None = Field(default=None, ge=1)
    """mag, mal: tokens that attention sees, the current one included. transformer: the same, or none for all tokens."""
    num_persistent: int = Field(default=0, ge=0)
    """Learned tokens per layer that attention always sees."""
    join: Literal["sum", "product"] = "sum"
    """mac, mag: how attention and memory meet: a gated sum of both, or one times sigmoid of the other (paper)."""
    mac_writes: Literal["residual", "attention"] = "residual"
    """mac: what its memory is taught and asked with: tokens plus attention's output, or that output alone (paper)."""
    rope_base: float = Field(default=10_000.0, gt=1)
    """Base of the rotary phases of the attention."""
    tie_embeddings: bool = True
    """Whether the output head uses the embedding's weights."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the mean square inside every RMSNorm of the model's width."""
    memory: MemoryConfig | None = None
    """The neural memory; required for every variant but transformer, which has none."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.num_heads

    @property
    def has_attention(self) -> bool:
        """Whether blocks hold an attention."""
        return self.variant != "lmm"

    @property
    def grid(self) -> int:
        """A document may begin in mid-sequence at multiples of this many tokens from the state's beginning: a segment
        of the mac, a chunk of other memories, any token of a transformer."""
        if self.variant == "mac":
            return self.segment
        return 1 if self.memory is None else self.memory.chunk

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The named preset, `{variant}-{size}`, with fields replaced; a `memory` mapping replaces single memory fields.

        Raises:
            ValueError: an unknown name, or what the fields' validation raises.
        """
        fields = preset_fields(name)
        memory = overrides.pop("memory", {})
        if isinstance(memory, MemoryConfig):
            memory = memory.model_dump()
        if memory is None:
            fields["memory"] = None
        elif memory:
            fields["memory"] = {**(fields.get("memory") or {}), **memory}
        return cls.model_validate({**fields, **overrides})

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        self._check_heads()
        self._check_memory()
        self._check_attention()
        return self

    def _check_heads(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim is {self.dim}, num_heads {self.num_heads}: heads must divide the width; "
                f"make dim a multiple of {self.num_heads}"
            )
        if self.has_attention and self.head_dim % 2:
            raise ValueError(
                f"dim / num_heads is {self.head_dim}: rotary phases turn pairs, so the head's width must be even"
            )

    def _check_memory(self) -> None:
        if self.variant == "transformer":
            if self.memory is not None:
                raise ValueError("memory is set, but variant is transformer, which has none: remove memory")
            return
        if self.memory is None:
            raise ValueError(f"memory is missing: variant {self.variant} needs it, if only as an empty mapping")
        if self.variant != "mac":
            if self.segment is not None:
                raise ValueError(f"segment is {self.segment}, but only variant mac has segments: remove it")
        elif self.segment is None:
            raise ValueError(
                f"segment is missing: variant mac needs it, a multiple of memory.chunk {self.memory.chunk}"
            )
        elif self.segment % self.memory.chunk:
            nearest = max(1, round(self.segment / self.memory.chunk)) * self.memory.chunk
            raise ValueError(
                f"segment is {self.segment}, memory.chunk {self.memory.chunk}: "
                f"a segment is a whole number of chunks, {nearest} for example"
            )

    def _check_attention(self) -> None:
        if self.variant in ("mag", "mal") and self.window is None:
            raise ValueError(f"window is missing: variant {self.variant} needs it, 1024 for example")
        if self.variant in ("mac", "lmm") and self.window is not None:
            why = "its attention sees the running segment" if self.variant == "mac" else "it has no attention"
            raise ValueError(f"window is {self.window}, but variant is {self.variant}: {why}; remove it")
        if self.variant == "transformer" and self.segment is not None:
            raise ValueError(f"segment is {self.segment}, but only variant mac has segments: remove it")
        if not self.has_attention and self.rope_base != type(self).model_fields["rope_base"].default:
            raise ValueError(f"rope_base is {self.rope_base}, but variant lmm has no attention to turn: remove it")
        if not self.has_attention and self.num_persistent:
            raise ValueError(
                f"num_persistent is {self.num_persistent}, but variant lmm has no attention to see them: set it to 0"
            )
        if self.variant not in ("mac", "mag") and self.join != "sum":
            raise ValueError(f"join is {self.join}, but only mac and mag join attention and memory: remove it")
        if self.variant != "mac" and self.mac_writes != "residual":
            raise ValueError(f"mac_writes is {self.mac_writes}, but variant is {self.variant}: remove it")
