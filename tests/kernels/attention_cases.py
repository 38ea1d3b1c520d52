"""Inputs of attention with and without prefix, second stream and cache, and where documents begin in them."""

import torch
from torch import Tensor

from kernels.attention import Prefix, attention

BATCH, HEADS, WIDTH = 2, 2, 8
DOCUMENTS = ((0, 2, 3, 9, 14, 21, 31, 36), (0, 12, 24))
"""Key indices at which each row's documents begin; longer inputs stay in the last document."""


def draw_inputs(length: int, total: int, has_prefix: bool, has_context: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Leaves with gradient, standard normal; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(length + total)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, HEADS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tensors = {"q": draw(BATCH, length), "k": draw(BATCH, total), "v": draw(BATCH, total)}
    if has_prefix:
        tensors |= {"plain_q": draw(BATCH, length), "prefix_k": draw(3), "prefix_v": draw(3)}
    if has_context:
        tensors |= {"context_k": draw(BATCH, total), "context_v": draw(BATCH, total)}
    return tensors


def run_attention(tensors: dict[str, Tensor], **options: object) -> Tensor:
    """`attention` on what `draw_inputs` drew; options: window, first_valid, first_visible, backend."""
    prefix = Prefix(tensors["plain_q"], tensors["prefix_k"], tensors["prefix_v"]) if "plain_q" in tensors else None
    context = (tensors["context_k"], tensors["context_v"]) if "context_k" in tensors else None
    return attention(tensors["q"], tensors["k"], tensors["v"], prefix=prefix, context=context, **options)


def with_gradients(out: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The output and the gradients of a loss in which every element of it counts differently."""
    return out, *torch.autograd.grad((out * out.detach().sin()).sum(), list(tensors.values()))


def first_visible_keys(length: int, total: int) -> Tensor:
    """`first_visible` [BATCH, length] of `DOCUMENTS`."""
    return torch.tensor([
        [max(start for start in row if start <= index) for index in range(total - length, total)] for row in DOCUMENTS
    ])  # fmt: skip


def attention_by_document(tensors: dict[str, Tensor], window: int | None) -> Tensor:
    """The plain formula on one document of one row after another: the oracle of `first_visible`."""
    total = tensors["k"].shape[1]
    offset = total - tensors["q"].shape[1]
    rows = []
    for row, starts in enumerate(DOCUMENTS):
        parts = []
        for start, stop in zip(starts, (*starts[1:], total), strict=True):
            first, last = max(start, offset), min(stop, total)
            if first >= last:
                continue
            queries, keys = slice(first - offset, last - offset), slice(start, last)
            piece = {name: tensor[row : row + 1, keys] for name, tensor in tensors.items()}
            piece |= {name: tensors[name][row : row + 1, queries] for name in ("q", "plain_q") if name in tensors}
            piece |= {name: tensors[name] for name in ("prefix_k", "prefix_v") if name in tensors}
            parts.append(run_attention(piece, window=window, backend="math"))
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)
