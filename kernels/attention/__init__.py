"""Causal attention for every variant: full, sliding window, always-visible prefix, and the MAC's second stream."""

from kernels.attention.choice import BACKENDS
from kernels.attention.inputs import Prefix
from kernels.attention.interface import attention, explain_attention

__all__ = ["BACKENDS", "Prefix", "attention", "explain_attention"]
