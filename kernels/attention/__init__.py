"""Causal attention for every variant: full, sliding window, always-visible prefix, and the MAC's second stream."""

from kernels.attention.inputs import Prefix
from kernels.attention.interface import attention

__all__ = ["Prefix", "attention"]
