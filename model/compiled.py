"""The small operations between a model's products, fused by torch.compile."""

import torch
from torch import nn

from model.gates import GateProjection
from model.layers import CausalConvolution, GatedSilu, HeadNorm, RMSNorm, UnitSilu
from model.rope import Rotation

PARTS = (RMSNorm, HeadNorm, GatedSilu, UnitSilu, CausalConvolution, GateProjection, Rotation)
"""What is compiled: modules without modules inside, whose operations read and write far more than they compute."""


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile would find no C++ compiler, which it needs for a CPU."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # their import takes the compiler's with it
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            f"{error}; install g++ or name a compiler in the environment's CXX, or leave it off"
        ) from error


def compile_parts(model: nn.Module, backend: str = "inductor") -> None:
    """Makes each of `PARTS` in the model run compiled, forward and backward; results stay the same up to rounding.

    Each is compiled on its first call, and again for other shapes: a few times, and then for all lengths. That takes a
    C++ compiler for a CPU and Triton for a GPU.

    Args:
        backend: of torch.compile.
    """
    for module in model.modules():
        if isinstance(module, PARTS):
            # Its forward alone, so that hooks on the module run as they are: ZeRO 3 gathers the parameters in them.
            module.forward = torch.compile(module.forward, backend=backend)
