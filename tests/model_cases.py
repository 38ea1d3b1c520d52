"""Small models of every variant, their parameters moved off their starts so that none has a trivial gradient."""

import torch
from torch import Tensor

from model import ModelConfig, TitansLM

_MEMORY = {"depth": 2, "expansion": 2, "chunk": 4}
CASES = {
    "mac": {"variant": "mac", "segment": 8, "num_persistent": 3, "memory": _MEMORY},
    "mac-paper": {
        "variant": "mac",
        "segment": 4,
        "join": "product",
        "mac_writes": "attention",
        "memory": {**_MEMORY, "convolution": 0},
    },
    "mag": {"variant": "mag", "window": 6, "num_persistent": 3, "memory": _MEMORY},
    "mag-deep": {
        "variant": "mag",
        "window": 1,
        "num_persistent": 2,
        "join": "product",
        "memory": {**_MEMORY, "depth": 4},
    },
    "mal": {"variant": "mal", "window": 6, "num_persistent": 2, "memory": {**_MEMORY, "activation": "gelu"}},
    "lmm": {"variant": "lmm", "tie_embeddings": False, "memory": {**_MEMORY, "normalize_values": False}},
    "lmm-softmax": {"variant": "lmm", "memory": {**_MEMORY, "activation": "softmax", "forget_to": "zero"}},
    "linear": {
        "variant": "lmm",
        "memory": {"depth": 1, "chunk": 4, "objective": "dot", "momentum": False, "step_bound": None},
    },
    "delta": {"variant": "lmm", "memory": {"depth": 1, "chunk": 4, "momentum": False, "forgetting": False}},
    "transformer": {"variant": "transformer"},
    "transformer-window": {"variant": "transformer", "window": 5, "num_persistent": 2},
}


def build_model(case: str, dtype: torch.dtype = torch.float64, **overrides: object) -> TitansLM:
    """A model of 2 layers of width 16, vocabulary 31."""
    sizes = {"vocab_size": 31, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24}
    torch.manual_seed(1)
    model = TitansLM(ModelConfig.model_validate({**sizes, **CASES[case], **overrides})).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            shift = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            # Less where rounding is compared: larger weights amplify it from layer to layer and token to token.
            parameter += (0.2 if dtype == torch.float64 else 0.1) * shift.to(dtype)
    return model


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens of the small models' vocabulary."""
    return torch.randint(31, (rows, length), generator=torch.Generator().manual_seed(seed))
