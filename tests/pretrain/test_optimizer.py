"""Who decays: every trained parameter is in one group, matrices in the one with decay."""

from __future__ import annotations

import pytest
import torch

from model import ModelConfig, TitansLM
from pretrain.optimizer import OptimizerConfig, build_optimizer

CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm", "transformer"])
def test_matrices_decay_and_nothing_else(variant: str) -> None:
    model = TitansLM(ModelConfig.preset(f"{variant}-tiny", dim=32, ffn_dim=48, num_heads=2, vocab_size=64))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3), CPU)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = [names[p] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    assert {names[p] for p in decayed["params"]} == model.decay_parameters()
    assert all(p.ndim == 2 for p in decayed["params"])
    assert any("embedding" in names[p] for p in others["params"])


def test_a_frozen_parameter_is_left_alone() -> None:
    model = TitansLM(ModelConfig.preset("lmm-tiny", dim=32, ffn_dim=48, num_heads=2, vocab_size=64))
    model.norm.weight.requires_grad_(False)
    held = [p for group in build_optimizer(model, OptimizerConfig(), CPU).param_groups for p in group["params"]]
    assert not any(p is model.norm.weight for p in held)


def test_a_name_that_is_no_parameter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TitansLM(ModelConfig.preset("lmm-tiny", dim=32, ffn_dim=48, num_heads=2, vocab_size=64))
    monkeypatch.setattr(model, "decay_parameters", lambda: {"renamed.weight"})
    with pytest.raises(ValueError, match=r"renamed\.weight"):
        build_optimizer(model, OptimizerConfig(), CPU)
