"""The attention layer: rotary phases, persistent tokens, a bounded cache, and the mac's second stream."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.attention import Prefix, attention, explain_attention
from model.config import ModelConfig
from model.layers import linear
from model.resets import Resets
from model.rope import Rotary, Rotation
from model.state import AttentionCache


class AttentionLayer(nn.Module):
    """Causal attention over the cache and the tokens given: a window, the running segment, or everything."""

    def __init__(self, config: ModelConfig, scale: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.window = config.window
        self.backend = "auto"
        """Of kernels.attention: what computes the attention, never what is computed."""
        self.entry = nn.Identity()
        """What the layer's maps read passes here, each tensor once: a place to act on all of their gradients."""
        self.q = linear(config.dim, config.dim)
        self.k = linear(config.dim, config.dim)
        self.v = linear(config.dim, config.dim)
        self.output = linear(config.dim, config.dim, scale)
        self.to_heads, self.to_tokens = nn.Identity(), nn.Identity()
        """What the maps give of tokens passes the first, and what tokens have seen the second: places to go from all
        heads of some tokens to all tokens of some heads, and back."""
        self.own = slice(None)
        """The channels of those heads, of all that the maps give."""
        self.rotate = Rotation()
        # Vectors of the model's width through the layer's own maps, as the paper's section 3.3 has them; as large as a
        # normalised token, so that they start as keys and values of an ordinary size.
        self.persistent = (
            nn.Parameter(torch.randn(config.num_persistent, config.dim)) if config.num_persistent else None
        )

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        cache: AttentionCache | None,
        context: Tensor | None = None,
        resets: Resets | None = None,
    ) -> tuple[Tensor, AttentionCache]:
        """Attends from x [B, T, dim], whose keys and values join the cache.

        Args:
            context: the mac's h [B, T, dim], a second stream under the same causal mask, with phases as its tokens.
            resets: where rows begin a document, whose tokens see nothing from before it.

        Returns:
            [B, T, dim] and the cache for what follows.
        """
        begins = None if resets is None else resets.begins
        x = self.entry(x)
        plain_q, plain_k, v = (self._heads(self.to_heads(maps(x))) for maps in (self.q, self.k, self.v))
        grown = _grow(cache, self.rotate(plain_k, rotary), v, *self._context(context, rotary))
        y = attention(
            self.rotate(plain_q, rotary), grown.k, grown.v,
            window=self.window,
            prefix=self._prefix(plain_q),
            context=None if context is None else (grown.context_k, grown.context_v),
            first_valid=None if cache is None else cache.first_valid,
            first_visible=None if resets is None else resets.first_visible(grown.k.shape[1] - v.shape[1]),
            backend=self.backend,
        )  # fmt: skip
        if begins is not None:
            grown = _hidden_before(grown, begins)
        return self.output(self.to_tokens(y).flatten(2)), grown if self.window is None else _keep_last(
            grown, self.window - 1
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def _context(self, context: Tensor | None, rotary: Rotary) -> tuple[Tensor | None, Tensor | None]:
        if context is None:
            return None, None
        context = self.entry(context)
        return self.rotate(self._heads(self.k(context)), rotary), self._heads(self.v(context))

    def _prefix(self, plain_q: Tensor) -> Prefix | None:
        if self.persistent is None:
            return None
        persistent = self.entry(self.persistent)
        return Prefix(plain_q, *(self._heads(maps(persistent)[:, self.own]) for maps in (self.k, self.v)))


def explain_attention_backend(
    config: ModelConfig,
    backend: str,
    *,
    rows: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    documents: bool = False,
) -> str:
    """What computes the attention of a model in training, and why: `kernels.attention.explain_attention` of what it
    first attends over.

    Args:
        backend: as of `TitansLM.set_attention_backend`.
        rows, length: of the tokens [rows, length] that the model reads from a beginning.
        documents: whether rows begin a document in them, as `resets` tells the model.

    Raises:
        ValueError: the backend does not take this attention, or there is none of that name; the message says why.
    """
    # All elements are one, so that a long row takes no memory: nothing is computed with them.
    number = torch.zeros((), device=device, dtype=dtype, requires_grad=True)
    persistent = number.expand(config.num_persistent, config.num_heads, config.head_dim)

    def explain(length: int) -> str:
        x = number.expand(rows, length, config.num_heads, config.head_dim)
        return explain_attention(
            x, x, x,
            window=config.window,
            prefix=Prefix(x, persistent, persistent) if config.num_persistent else None,
            context=(x, x) if config.variant == "mac" else None,
            first_visible=torch.zeros(rows, length, dtype=torch.int64, device=device) if documents else None,
            backend=backend,
        )  # fmt: skip

    if config.segment is None or length <= config.segment:
        return explain(length)
    if rest := length % config.segment:
        explain(rest)  # raises where only the whole segments are taken
    return explain(config.segment)


def _grow(
    cache: AttentionCache | None, k: Tensor, v: Tensor, context_k: Tensor | None, context_v: Tensor | None
) -> AttentionCache:
    """The cache with new keys and values behind the old, in the precision of the new."""

    def behind(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat((old.to(new.dtype), new), 1)

    if cache is None:
        return AttentionCache(k, v, torch.zeros(k.shape[0], dtype=torch.int64, device=k.device), context_k, context_v)
    if context_k is not None:
        context_k, context_v = behind(cache.context_k, context_k), behind(cache.context_v, context_v)
    return AttentionCache(behind(cache.k, k), behind(cache.v, v), cache.first_valid, context_k, context_v)


def _hidden_before(cache: AttentionCache, begins: Tensor) -> AttentionCache:
    """The cache, whose last tokens' documents begin at `begins` [B, T], with what is before each row's last one out of
    sight; and cleared, as a masked key that isn't finite would still spoil its row.
    """
    length = cache.k.shape[1]
    first_valid = torch.maximum(cache.first_valid, begins[:, -1] + length - begins.shape[1])
    hidden = (torch.arange(length, device=begins.device) < first_valid[:, None])[..., None, None]
    return replace(cache, k=cache.k.masked_fill(hidden, 0), v=cache.v.masked_fill(hidden, 0), first_valid=first_valid)


def _keep_last(cache: AttentionCache, count: int) -> AttentionCache:
    """The last `count` tokens of a window's cache."""
    surplus = cache.k.shape[1] - count
    if surplus <= 0:
        return cache
    # Copies: views would keep all that was ever cached alive.
    first_valid = (cache.first_valid - surplus).clamp(min=0)
    return AttentionCache(cache.k[:, surplus:].clone(), cache.v[:, surplus:].clone(), first_valid)
