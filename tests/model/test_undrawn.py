"""Models of shapes alone have the shapes of real ones, and draw nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from model import ModelConfig, TitansLM
from model.undrawn import undrawn
from tests.model_cases import CASES, build_model

SIZES = {"vocab_size": 31, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24}


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_of_a_real_model_and_nothing_is_drawn(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = build_model(case)

    def drawn(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a number was drawn")

    for name in ("_no_grad_normal_", "_no_grad_uniform_"):
        monkeypatch.setattr(nn.init, name, drawn)
    before = torch.get_rng_state()
    found = undrawn(lambda: TitansLM(ModelConfig.model_validate({**SIZES, **CASES[case]})))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta and parameter.requires_grad for parameter in found.parameters())
    shapes = [(name, parameter.shape) for name, parameter in found.named_parameters()]
    assert shapes == [(name, parameter.shape) for name, parameter in real.named_parameters()]
    assert found.decay_parameters() == real.decay_parameters()
