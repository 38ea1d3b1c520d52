"""Layouts that a model cannot be run in, and what is said of them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from model import ModelConfig
from parallel.config import ParallelConfig
from parallel.layout_rules import require_layout

LENGTHS = {"training.sequence_length": 64, "training.segment_length": 24}


def model(variant: str = "mag", **fields: Any) -> ModelConfig:
    """4 heads, a feed-forward of 24, 32 tokens, 2 layers."""
    sizes = {"vocab_size": 32, "dim": 16, "num_layers": 2, "num_heads": 4, "ffn_dim": 24}
    return ModelConfig.preset(f"{variant}-tiny", **sizes | fields)


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"tensor": 8}, {}, r"tensor 8 does not divide model.num_heads 4: .*divisor of it, or model.num_heads 8"),
        ({"tensor": 4}, {"ffn_dim": 26}, r"tensor 4 does not divide model.ffn_dim 26: .* model.ffn_dim 24 or 28"),
        ({"tensor": 4}, {"vocab_size": 30}, r"tensor 4 does not divide model.vocab_size 30: .* model.vocab_size 32 \("),
        ({"pipeline": 3}, {}, r"pipeline is 3, but the model has 2 layers: .* set it to 2 or less"),
        ({"sequence": 2}, {"variant": "mac"}, r"sequence is 2, but model.variant is mac: .* parallel.tensor"),
        ({"sequence": 8}, {}, r"sequence 8 does not divide the 4 heads that parallel.tensor 1 leaves of .*num_heads 4"),
        ({"sequence": 4, "tensor": 2}, {}, r"sequence 4 does not divide the 2 heads that parallel.tensor 2 leaves"),
        (
            {"sequence": 16},
            {"num_heads": 16, "dim": 32},
            r"sequence 16 does not divide training.segment_length 24: .* multiple of 16",
        ),
        (
            {"tensor": 16, "tensor_shard_norms": True},
            {"num_heads": 16, "dim": 32, "ffn_dim": 32},
            r"tensor 16 with parallel.tensor_shard_norms does not divide training.segment_length 24: .* multiple of 16",
        ),
        (
            {"tensor": 4, "sequence": 4, "tensor_shard_norms": True},
            {"num_heads": 16, "dim": 32},
            r"tensor 4 with parallel.tensor_shard_norms x sequence 4 does not divide .*segment_length 24: .* of 16",
        ),
    ],
)
def test_a_layout_that_a_model_does_not_admit_is_refused_with_the_reason_and_the_fix(
    fields: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        require_layout(ParallelConfig(**fields), model(**changes), lengths=LENGTHS)


def refusal(variant: str, fields: dict[str, int]) -> str | None:
    """What is said against a layout; None where it is let pass."""
    try:
        require_layout(ParallelConfig(**fields), model(variant), lengths=LENGTHS)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm", "transformer"])
def test_layouts_that_fit_are_let_pass(variant: str) -> None:
    fitting = [{}, {"tensor": 4}, {"pipeline": 2, "tensor": 2}, {"sequence": 1 if variant == "mac" else 4}]
    assert [refusal(variant, fields) for fields in fitting] == [None] * len(fitting)
    assert refusal(variant, {"tensor": 8}) is not None, "what is said would be seen"


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_2_and_3_are_refused_with_a_pipeline(stage: int) -> None:
    with pytest.raises(ValidationError, match=rf"zero_stage {stage} with pipeline 2 .* use zero_stage 1"):
        ParallelConfig(pipeline=2, zero_stage=stage)


def test_norms_are_divided_over_tensor_ranks_alone() -> None:
    with pytest.raises(ValidationError, match="tensor_shard_norms is true, but tensor is 1: .* remove it"):
        ParallelConfig(tensor_shard_norms=True)
    assert ParallelConfig(tensor=2, sequence=3, tensor_shard_norms=True).stretches == 6
    assert ParallelConfig(tensor=2, sequence=3).stretches == 3


def test_what_the_other_axes_leave_of_the_ranks_is_data_parallel() -> None:
    layout = ParallelConfig(tensor=2, sequence=2, pipeline=3).layout(24)
    assert layout.sizes == (3, 2, 2, 2)
    with pytest.raises(ValueError, match="10 ranks cannot be laid out"):
        ParallelConfig(tensor=4).layout(10)
