"""Attention as the formula says it: the oracle of every other backend. Quadratic in the length."""

import torch
from torch import Tensor

from kernels.attention.inputs import AttentionInputs, indices, visible


def attention_reference(inputs: AttentionInputs) -> Tensor:
    """One softmax over [prefix | each stream's visible keys]; [B, H, Tq, D]. Softmax in fp32 or better."""
    q, scale = inputs.q, inputs.q.shape[-1] ** -0.5
    length = inputs.streams[0][0].shape[2]
    mask = visible(
        indices(inputs.offset, length, q.device), indices(0, length, q.device), inputs.window, inputs.first_visible
    )
    scores = [(q @ keys.mT).masked_fill(~mask, float("-inf")) for keys, _ in inputs.streams]
    values = [values for _, values in inputs.streams]
    if inputs.prefix is not None:
        scores.append(inputs.prefix.q @ inputs.prefix.k.mT)
        values.append(inputs.prefix.v.expand(q.shape[0], -1, -1, -1))
    logits = torch.cat(scores, -1) * scale
    weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return weights.to(q.dtype) @ torch.cat(values, 2)
