"""The sequence mixers, one per variant (Titans, arXiv 2501.00663, section 4): pre-norm, each with its residual."""

import torch
from torch import Tensor, nn

from model.attention import AttentionLayer
from model.config import ModelConfig
from model.join import Join
from model.layers import RMSNorm
from model.memory import MemoryLayer, Stats, end_segment, mean_statistics
from model.resets import Resets
from model.rope import Rotary
from model.state import LayerState

Mixed = tuple[Tensor, LayerState, Stats]


class MemoryMixer(nn.Module):
    """LMM: the memory alone; also the first half of MAL."""

    def __init__(self, config: ModelConfig, scale: float) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.memory = MemoryLayer(config, scale)

    def forward(
        self, x: Tensor, rotary: Rotary | None, state: LayerState, resets: Resets | None, with_stats: bool
    ) -> Mixed:
        """x [B, T, dim] to x + memory."""
        out, memory, stats = self.memory(self.norm(x), state.memory, resets, with_stats)
        return x + out, LayerState(memory=memory), stats


class AttentionMixer(nn.Module):
    """Transformer: attention alone, full or in a window; also the second half of MAL."""

    def __init__(self, config: ModelConfig, scale: float) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = AttentionLayer(config, scale)

    def forward(
        self, x: Tensor, rotary: Rotary | None, state: LayerState, resets: Resets | None, with_stats: bool
    ) -> Mixed:
        """x [B, T, dim] to x + attention."""
        out, cache = self.attention(self.norm(x), rotary, state.attention, resets=resets)
        return x + out, LayerState(attention=cache), {}


class MalMixer(nn.Module):
    """MAL: memory, then sliding-window attention on what it gave (section 4.3)."""

    def __init__(self, config: ModelConfig, scale: float) -> None:
        super().__init__()
        self.first = MemoryMixer(config, scale)
        self.second = AttentionMixer(config, scale)

    def forward(
        self, x: Tensor, rotary: Rotary | None, state: LayerState, resets: Resets | None, with_stats: bool
    ) -> Mixed:
        """x [B, T, dim] through both."""
        x, written, stats = self.first(x, rotary, state, resets, with_stats)
        x, attended, _ = self.second(x, rotary, state, resets, with_stats)
        return x, LayerState(written.memory, attended.attention), stats


class MagMixer(nn.Module):
    """MAG: sliding-window attention beside the memory on the same input, joined by gates (section 4.2)."""

    def __init__(self, config: ModelConfig, scale: float) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        # The join's norms set the size of the branch, so neither output map is scaled down.
        self.attention = AttentionLayer(config, 1.0)
        self.memory = MemoryLayer(config, 1.0)
        self.join = Join(config, scale)

    def forward(
        self, x: Tensor, rotary: Rotary | None, state: LayerState, resets: Resets | None, with_stats: bool
    ) -> Mixed:
        """x [B, T, dim] to x + join(attention, memory)."""
        tokens = self.norm(x)
        y, cache = self.attention(tokens, rotary, state.attention, resets=resets)
        m, memory, stats = self.memory(tokens, state.memory, resets, with_stats)
        return x + self.join(y, m, tokens), LayerState(memory, cache), stats


class MacMixer(nn.Module):
    """MAC: attention over the running segment and what the memory recalls for it (section 4.1).

    Within a segment, token i attends to [persistent | h_j, j <= i | x_j, j <= i], where h_j = M(q_j) at the segment's
    start; its output y_i, added to the token, is written to the memory and read back at token i, and y and the read are
    joined. The paper writes the segment as a whole and lets every token see every h_j: both would show a token its
    future.
    """

    def __init__(self, config: ModelConfig, scale: float) -> None:
        super().__init__()
        self.segment = config.segment
        self.writes_tokens = config.mac_writes == "residual"
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = AttentionLayer(config, 1.0)
        # Attention averages: alone, its output is many times smaller than a token, and so would be what it is taught.
        self.written = RMSNorm(config.dim, config.norm_eps)
        self.memory = MemoryLayer(config, 1.0)
        self.join = Join(config, scale)

    def forward(
        self, x: Tensor, rotary: Rotary | None, state: LayerState, resets: Resets | None, with_stats: bool
    ) -> Mixed:
        """x [B, T, dim] to x + join(attention, memory), segment by segment; a segment may be cut across calls."""
        tokens = self.norm(x)
        outputs: list[tuple[Tensor, Tensor]] = []
        parts: list[tuple[int, Stats]] = []
        start = 0
        while start < tokens.shape[1]:
            filled = 0 if state.attention is None else state.attention.k.shape[1]
            stop = min(tokens.shape[1], start + self.segment - filled)
            inside = None if resets is None else resets.piece(start, stop)
            y, m, state, stats = self._piece(
                tokens[:, start:stop], rotary.piece(start, stop), state, inside, with_stats
            )
            outputs.append((y, m))
            parts.append((stop - start, stats))
            start = stop
        y, m = (torch.cat(pieces, 1) for pieces in zip(*outputs, strict=True))
        return x + self.join(y, m, tokens), state, mean_statistics(parts) if with_stats else {}

    def _piece(
        self, tokens: Tensor, rotary: Rotary, state: LayerState, resets: Resets | None, with_stats: bool
    ) -> tuple[Tensor, Tensor, LayerState, Stats]:
        """Tokens of one segment, or of a part of it: attention's and memory's outputs, the state behind them.

        Rows begin anew at the segment's first token, where attention sees nothing from before as it is, or not at all.
        """
        context, memory = self.memory.read_segment(tokens, state.memory, resets)
        y, cache = self.attention(tokens, rotary, state.attention, context)
        written = self.written(tokens + y if self.writes_tokens else y)
        m, memory, stats = self.memory(written, memory, resets, with_stats, is_at_start=True)
        if cache.k.shape[1] == self.segment:
            return y, m, LayerState(end_segment(memory), None), stats
        return y, m, LayerState(memory, cache), stats


MIXERS = {"mac": MacMixer, "mag": MagMixer, "mal": MalMixer, "lmm": MemoryMixer, "transformer": AttentionMixer}
"""The mixer of each variant."""
