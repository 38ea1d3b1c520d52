"""From initialisation no variant's memory runs away over 65,536 tokens, runs of one token included."""

from __future__ import annotations

import pytest
import torch

from model import ModelConfig, TitansLM

NUM_TOKENS = 65_536
PIECE = 8_192
SIZES = {"vocab_size": 31, "dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32}
VARIANTS = {
    "lmm": {"variant": "lmm"},
    "mac": {"variant": "mac", "segment": 256},
    "mag": {"variant": "mag", "window": 256},
    "mal": {"variant": "mal", "window": 256},
}


@torch.no_grad()
def assert_stable(variant: str, depth: int, chunk: int) -> None:
    torch.manual_seed(0)
    memory = {"depth": depth, "chunk": chunk}
    model = TitansLM(ModelConfig.model_validate({**SIZES, **VARIANTS[variant], "memory": memory})).eval()
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(31, (NUM_TOKENS,), generator=generator)
    same = torch.full((NUM_TOKENS,), 7)
    runs = torch.where(torch.arange(NUM_TOKENS) // 500 % 2 == 0, random, same)
    tokens = torch.stack([random, same, runs])
    # A last layer starts at zero: it is held against the norm of an orthogonal map, sqrt(head_dim) for each head.
    learned = [p for name, p in model.named_parameters() if ".core.initial_" in name]
    assert len(learned) == depth
    limits = 10 * torch.stack([w.norm() for w in learned]).clamp(min=model.config.dim**0.5)
    state = None
    for piece in tokens.split(PIECE, dim=1):
        output = model(piece, state)
        state = output.state
        assert bool(output.logits.isfinite().all())
        (layer,) = state.layers
        norms = torch.stack([w.flatten(1).norm(dim=1) for w in layer.memory.memory.weights])
        assert bool((norms < limits.unsqueeze(1)).all()), norms


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_no_runaway_over_65536_tokens(variant: str) -> None:
    assert_stable(variant, depth=2, chunk=64)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [16, 256])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_no_runaway_over_65536_tokens_at_other_depths_and_chunks(depth: int, chunk: int) -> None:
    assert_stable("lmm", depth, chunk)
