"""Stand-ins for kernels that need a GPU: functions of the documented signatures that compute by the plain formula.

They check what they are given as the kernels would, so that a wrong layout, window or alignment shows as an error or as
a wrong number.
"""

import math
import sys
import types

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.attention.varlen as torch_varlen
from torch import Tensor
from torch._higher_order_ops.flex_attention import math_attention

from kernels.attention import choice, flash, flex, packed, problem, selftest, varlen


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    """Sequence by sequence; `window_size` counts keys before and behind the query's own, -1 for all of them."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds = []
    for cu, x, longest in ((cu_q, q, max_q), (cu_k, k, max_k)):
        assert x.is_contiguous() and x.dim() == 3
        assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == len(x), "cu_seqlens don't cover the tensors"
        assert (cu.diff() >= 0).all() and cu.diff().max() <= longest, "a sequence is longer than the longest"
        bounds.append(list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)))
    assert v.shape == k.shape and v.is_contiguous() and len(bounds[0]) == len(bounds[1])
    before, behind = window_size
    out = []
    for (first_q, last_q), (first_k, last_k) in zip(*bounds, strict=True):
        queries, keys = last_q - first_q, last_k - first_k
        own = torch.arange(queries)[:, None] + keys - queries  # aligned at the end
        index = torch.arange(keys)[None]
        sees = torch.ones(queries, keys, dtype=torch.bool)
        if behind >= 0:
            sees &= index <= own + behind
        if before >= 0:
            sees &= index >= own - before
        assert sees.any(1).all(), "a query sees nothing"
        scores = torch.einsum("qhd,khd->hqk", q[first_q:last_q], k[first_k:last_k]) * scale
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[first_k:last_k]))
    return torch.cat(out)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn 2.8's signature."""
    assert (dropout_p, softcap, alibi_slopes, return_attn_probs, block_table) == (0.0, 0.0, None, False, None)
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    window = (window_size[0], 0) if causal else window_size
    return packed_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window
    )  # fmt: skip


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """flash-attn 2.8's signature; the cache holds the queries' own keys already."""
    assert k is None and v is None and window_size == (-1, -1) and causal
    assert not (q.requires_grad and torch.is_grad_enabled()), "it has no backward"
    assert cache_leftpad is None or (cache_leftpad.dtype == torch.int32 and cache_leftpad.shape == q.shape[:1])
    rows = []
    for row in range(len(q)):
        first = 0 if cache_leftpad is None else int(cache_leftpad[row])
        keys, values = k_cache[row, first:cache_seqlens], v_cache[row, first:cache_seqlens]
        lengths = [torch.tensor([0, len(x)], dtype=torch.int32) for x in (q[row], keys)]
        rows.append(
            packed_attention(
                q[row].contiguous(), keys.contiguous(), values.contiguous(), *lengths, len(q[row]), len(keys),
                softmax_scale, (-1, 0),
            )
        )  # fmt: skip
    return torch.stack(rows)


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """torch 2.13's signature."""
    assert (return_aux, enable_gqa, seqused_k, block_table, num_splits) == (None, False, None, None, None)
    assert isinstance(window_size, tuple), "the kernel compares it with the tuple that means causal"
    return packed_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def flex_attention(query, key, value, *, block_mask, scale, return_aux=None):
    """FlexAttention by torch's own plain mathematics of it: the rule of the pairs, without blocks."""
    out, lse, _ = math_attention(query, key, value, torch_flex._identity, block_mask.as_tuple(), scale, {})
    return out if return_aux is None else (out, torch_flex.AuxOutput(lse=lse * math.log(2)))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the stand-ins where the kernels are looked for, and lets them run on a CPU, at any length."""
    module = types.ModuleType("flash_attn")
    module.__version__ = "2.8.3"
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    monkeypatch.setattr(problem, "FEW", 1)
    for kernels in (packed, flex):
        monkeypatch.setattr(kernels, "hardware_refusal", lambda _: None)
    monkeypatch.setattr(flex, "WIDTHS", range(1, 257))
    monkeypatch.setattr(flex, "BLOCK", 16)
    for name, value in {"QUERIES": {"one": 1, "few": 1, "many": 40}, "CACHED": 10, "MAX_WINDOW": 20}.items():
        monkeypatch.setattr(selftest, name, value)
    forget()


def forget() -> None:
    """Clears what was found out about the kernels of this process."""
    for known in (flash._missing, varlen._missing, choice._standing_refusal):
        known.cache_clear()
