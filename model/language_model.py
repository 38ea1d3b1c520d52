"""The Titans language model: embedding, blocks, head; one forward for whole sequences, pieces and single tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear
from torch.utils.checkpoint import checkpoint

from kernels.attention import BACKENDS as ATTENTION_BACKENDS
from kernels.cross_entropy import linear_cross_entropy, token_losses, token_scores
from kernels.memory.choice import BACKENDS as MEMORY_BACKENDS
from model.attention import AttentionLayer
from model.config import ModelConfig
from model.gates import GateProjection
from model.layers import RMSNorm, SwiGLU, linear, residual_scale
from model.memory import MemoryCore, Stats
from model.mixers import MIXERS, Mixed
from model.resets import Resets, find_resets
from model.rope import Rotary, rotary_phases
from model.state import LayerState, ModelState

EMBEDDING_STD = 0.02


class ModelOutput(NamedTuple):
    """What a forward gives."""

    logits: Tensor | None
    """[B, T or num_logits, vocab_size] in the parameters' dtype; None where targets were given."""
    state: ModelState
    """The state after the last token."""
    loss_sum: Tensor | None
    """Sum of -log p over the targets that count, in nats: a scalar, fp32 (float64 for a float64 model)."""
    stats: list[Stats] | None
    """A dictionary per layer if asked for: means of alpha, eta, theta, surprise, weight_norm; empty without memory."""
    correct: Tensor | None
    """Whether each target has the largest logit, if asked for: [B, T] bool, False at targets that don't count."""
    losses: Tensor | None = None
    """With `correct`, -log p of each target: [B, T] in nats, fp32, 0 at targets that don't count."""


class Block(nn.Module):
    """Mixer, then feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        scale = residual_scale(config.num_layers * (3 if config.variant == "mal" else 2))
        self.mixer = MIXERS[config.variant](config, scale)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = SwiGLU(config.dim, config.ffn_dim, scale)

    def forward(
        self, x: Tensor, rotary: Rotary | None, state: LayerState, resets: Resets | None, with_stats: bool
    ) -> Mixed:
        """x [B, T, dim] to x [B, T, dim], the layer's next state, and its statistics."""
        x, state, stats = self.mixer(x, rotary, state, resets, with_stats)
        return x + self.feed_forward(self.norm(x)), state, stats


class LMHead(nn.Module):
    """Logits, or the loss without holding all logits. It registers its weight, also when that is the embedding's."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, targets: Tensor | None, score: Callable[..., Any] = linear_cross_entropy) -> Any:
        """x [B, T, dim] to logits [B, T, V]; with targets [B, T] (-100: not counted) to what `score` makes of them: a
        function of kernels.cross_entropy, of features [B * T, dim], the weight, and targets [B * T].
        """
        if targets is None:
            return apply_linear(x, self.weight)
        return score(x.flatten(0, 1), self.weight, targets.flatten())


class TitansLM(nn.Module):
    """A language model whose layers learn while they read (Titans, arXiv 2501.00663).

    Initial weights come from torch's global generator. Parameters may be fp32, bf16 or float64; memory states, gates
    and norms are fp32 or better. Every parameter is used in the forward of the module that owns it only, as ZeRO-3
    needs.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.to_stretch, self.to_rows = nn.Identity(), nn.Identity()
        """Tokens and targets [B, T] pass the first, and what the head says of each token the second: places to take a
        stretch of every row alone, and to set it into the rows."""
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        own = None if config.tie_embeddings else linear(config.dim, config.vocab_size).weight
        self.head = LMHead(self.embedding.weight if own is None else own)
        self._activation_checkpointing = False

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        targets: Tensor | None = None,
        resets: Tensor | None = None,
        with_stats: bool = False,
        with_correct: bool = False,
        num_logits: int | None = None,
    ) -> ModelOutput:
        """Reads tokens after what `state` has seen.

        Pieces of any lengths, run in turn with the state handed on, give the logits of the whole. The state that comes
        back is differentiable; detach it to stop the gradient there.

        Args:
            tokens: [B, T] int64, T >= 1.
            state: where each row stands; None for beginnings.
            targets: [B, T] int64, -100 for tokens that don't count; then the loss is computed instead of the logits.
            resets: [B, T] bool, True at the first token of a document: from there on the row has the logits of that
                document run by itself. At multiples of `config.grid`, counted from the state's beginning, alone. On
                the CPU, whatever the tokens' device, it is read without waiting for the device.
            with_stats: also give each layer's statistics.
            with_correct: also say which targets have the largest logit, and each one's loss; there is no gradient then.
            num_logits: give the logits of the last so many tokens alone, 1 to T; None for all. Not with targets.

        Raises:
            ValueError: tokens, targets, resets or the state don't fit.
        """
        if num_logits is not None and (targets is not None or not 1 <= num_logits <= tokens.shape[-1]):
            raise ValueError(
                f"num_logits is {num_logits}: it must be from 1 to the number of tokens, {tokens.shape[-1]}, and "
                "None where there are targets"
            )
        if with_correct and targets is None:
            raise ValueError("with_correct is set, but there are no targets: give them, or compare the logits")
        x, after, layer_stats = self._read(tokens, state, targets, resets, with_stats)
        stats = layer_stats if with_stats else None
        if targets is None:
            if num_logits is None:
                logits = self.to_rows(self.head(x, None))
            else:
                logits = self.head(self.to_rows(x)[:, -num_logits:], None)
            return ModelOutput(logits, after, None, stats, None)
        targets = self.to_stretch(targets)
        if with_correct:
            losses, correct = (
                self.to_rows(of_token.view_as(targets)) for of_token in self.head(x, targets, token_scores)
            )
            return ModelOutput(None, after, losses.sum(), stats, correct, losses)
        return ModelOutput(None, after, self.head(x, targets), stats, None)

    @torch.no_grad()
    def token_losses(
        self, tokens: Tensor, targets: Tensor, state: ModelState | None = None
    ) -> tuple[Tensor, ModelState]:
        """-log p of each target, for evaluation: [B, T] in nats, fp32, 0 at targets of -100; and the state after them.

        Arguments as in `forward`; logits of all tokens never exist at once.
        """
        x, after, _ = self._read(tokens, state, targets, None, False)
        targets = self.to_stretch(targets)
        return self.to_rows(self.head(x, targets, token_losses).view_as(targets)), after

    def _read(
        self,
        tokens: Tensor,
        state: ModelState | None,
        targets: Tensor | None,
        resets: Tensor | None,
        with_stats: bool,
    ) -> tuple[Tensor, ModelState, list[Stats]]:
        """Everything before the head: normalised features [B, T, dim], the state after the tokens, the statistics."""
        self._check(tokens, state, targets, resets)
        if state is None:
            state = ModelState.initial(tokens.shape[0], self.config.num_layers, tokens.device)
            if resets is not None:  # nothing is before the first token
                resets = torch.cat((torch.zeros_like(resets[:, :1]), resets[:, 1:]), 1)
        found = find_resets(resets, state.restart, tokens.device)
        if found is not None:
            self._check_grid(found, state, resets)
        x = self.embedding(self.to_stretch(tokens))
        positions = _positions(state.position, tokens.shape[1], found)
        rotary = self._rotary(positions, x.dtype)
        layers, stats = [], []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x, layer, layer_stats = self._run_block(block, x, rotary, layer, found, with_stats)
            layers.append(layer)
            stats.append(layer_stats)
        return self.norm(x), ModelState(positions[:, -1] + 1, tuple(layers)), stats

    def initial_state(self, batch_size: int) -> ModelState:
        """The state before the first token of `batch_size` rows."""
        return ModelState.initial(batch_size, self.config.num_layers, self.norm.weight.device)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotary | None:
        """Phases for tokens at positions [B, T]; None for a model without attention."""
        if not self.config.has_attention:
            return None
        return rotary_phases(positions, self.config.head_dim, self.config.rope_base, dtype)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Whether backward recomputes a block's activations instead of keeping them; gradients stay the same."""
        self._activation_checkpointing = enabled

    def set_attention_backend(self, backend: str) -> None:
        """What computes the attention: "auto" or another name of kernels.attention.BACKENDS; results stay the same up
        to rounding. One that does not take the model's attention makes forward raise a ValueError that says why.
        """
        if backend not in ATTENTION_BACKENDS:
            raise ValueError(f"attention backend is {backend!r}: choose one of {', '.join(ATTENTION_BACKENDS)}")
        for module in self.modules():
            if isinstance(module, AttentionLayer):
                module.backend = backend

    def set_memory_backend(self, backend: str) -> None:
        """What computes the memories: "auto", "dual" or "triton" (kernels.memory); results stay the same up to
        rounding. One that does not take the model's memories makes forward raise a ValueError that says why.
        """
        if backend not in MEMORY_BACKENDS:
            raise ValueError(f"memory backend is {backend!r}: choose one of {', '.join(MEMORY_BACKENDS)}")
        for module in self.modules():
            if isinstance(module, MemoryCore):
                module.backend = backend

    def num_parameters(self) -> int:
        """Number of learned numbers, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def decay_parameters(self) -> set[str]:
        """Names of the parameters that weight decay is meant for: the matrices of linear maps.

        Left out: embeddings (and a head tied to them), norms, biases, convolutions, persistent tokens and W_0.
        """
        matrices = {
            f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear | GateProjection)
        }
        return matrices if self.config.tie_embeddings else matrices | {"head.weight"}

    def _run_block(
        self,
        block: Block,
        x: Tensor,
        rotary: Rotary | None,
        state: LayerState,
        resets: Resets | None,
        with_stats: bool,
    ) -> Mixed:
        if self._activation_checkpointing and torch.is_grad_enabled():
            # No dropout, so there is no random state to keep.
            return checkpoint(
                block, x, rotary, state, resets, with_stats, use_reentrant=False, preserve_rng_state=False
            )
        return block(x, rotary, state, resets, with_stats)

    def _check_grid(self, found: Resets, state: ModelState, resets: Tensor | None) -> None:
        """Refuses resets inside a chunk or segment; those of `ModelState.reset_rows` may stand anywhere."""
        if resets is None:
            return
        grid, seen = self.config.grid, max(_open_tokens(layer, self.config) for layer in state.layers)
        wrong = next((i for i in found.rows if (seen + i) % grid and resets[:, i].any()), None)
        if wrong is not None:
            name = "segment" if self.config.variant == "mac" else "memory.chunk"
            raise ValueError(
                f"resets has a document begin at token {wrong}, {(seen + wrong) % grid} tokens into a {name} of "
                f"{grid}: it must begin at one's first token; pad the document before it to a multiple of {grid}"
            )

    def _check(self, tokens: Tensor, state: ModelState | None, targets: Tensor | None, resets: Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.shape[1] == 0 or tokens.dtype != torch.int64:
            raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}: they must be int64 [B, T] with T >= 1")
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(
                f"targets are {list(targets.shape)}: they must have the shape of tokens, {list(tokens.shape)}"
            )
        if resets is not None and (resets.shape != tokens.shape or resets.dtype != torch.bool):
            raise ValueError(
                f"resets are {resets.dtype} {list(resets.shape)}: they must be bool, in the shape of tokens, "
                f"{list(tokens.shape)}"
            )
        if state is not None:
            rows, layers = len(state.position), len(state.layers)
            if rows != tokens.shape[0] or layers != self.config.num_layers:
                raise ValueError(
                    f"state has {rows} rows and {layers} layers, tokens {tokens.shape[0]} rows and the model "
                    f"{self.config.num_layers} layers: hand on the state of the same batch and model"
                )


def _open_tokens(layer: LayerState, config: ModelConfig) -> int:
    """Tokens of the chunk, or the mac's segment, that is not full."""
    if config.variant == "mac":
        return 0 if layer.attention is None else layer.attention.k.shape[1]
    return 0 if layer.memory is None else layer.memory.memory.num_open


def _positions(position: Tensor, length: int, resets: Resets | None) -> Tensor:
    """The positions of `length` tokens [B, T] behind those that each row has seen, `position` [B]."""
    columns = torch.arange(length, device=position.device)
    positions = position[:, None] + columns
    if resets is None or resets.begins is None:
        return positions
    return torch.where(resets.begins < 0, positions, columns - resets.begins)
