"""What DeepSpeed is told, where its defaults would change the training."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from parallel.config import ParallelConfig
from parallel.deepspeed_config import deepspeed_config


def settings(
    config: ParallelConfig,
    clip: float = 0.7,
    num_parameters: int = 1000,
    *,
    accumulation: int = 3,
    on_gpu: bool = False,
) -> dict[str, Any]:
    return deepspeed_config(
        config,
        micro_batch_size=2,
        accumulation=accumulation,
        data_ranks=4,
        gradient_clip=clip,
        num_parameters=num_parameters,
        on_gpu=on_gpu,
    )


def test_what_is_asked_for_goes_to_the_host() -> None:
    made = settings(ParallelConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True), on_gpu=True)
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert made["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert "offload_optimizer" not in settings(ParallelConfig())["zero_optimization"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({"offload_optimizer": True, "zero_stage": stage}, "use zero_stage 3") for stage in (1, 2)),
        ({"offload_parameters": True, "zero_stage": 3}, "set both, or remove it"),
    ],
)
def test_what_cannot_go_to_the_host_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ParallelConfig(**fields)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipping_is_always_said(stage: int) -> None:
    assert settings(ParallelConfig(zero_stage=stage), 0.7)["gradient_clipping"] == 0.7
    assert settings(ParallelConfig(zero_stage=stage), 0.0)["gradient_clipping"] == 0.0


def test_without_zero_the_engine_clips_itself() -> None:
    assert settings(ParallelConfig(zero_stage=0, precision="fp32"))["gradient_clipping"] == 0.0


def test_gradients_are_summed_in_fp32() -> None:
    made = settings(ParallelConfig(zero_stage=2, precision="bf16"))
    assert made["bf16"] == {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": True}
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert made["communication_data_type"] == "fp32"


def test_the_batch_is_derived_and_buckets_are_no_larger_than_the_model() -> None:
    made = settings(ParallelConfig(zero_stage=3, reduce_gradients="backward"))
    assert made["train_batch_size"] == 24
    assert made["zero_optimization"]["reduce_bucket_size"] == 1000
    assert made["zero_optimization"]["stage3_max_live_parameters"] == 2000


def test_gradients_that_wait_whole_for_one_reduction_are_stage_1s() -> None:
    stages = {
        (config.reduce_gradients, accumulation): settings(config, accumulation=accumulation)["zero_optimization"][
            "stage"
        ]
        for config in (ParallelConfig(zero_stage=2), ParallelConfig(zero_stage=2, reduce_gradients="backward"))
        for accumulation in (1, 3)
    }
    assert stages == {("step", 1): 2, ("step", 3): 1, ("backward", 1): 2, ("backward", 3): 2}


def test_to_stage_3_the_passes_that_it_reduces_at_once_are_one() -> None:
    made = settings(ParallelConfig(zero_stage=3))
    assert made["gradient_accumulation_steps"] == 1
    assert made["train_batch_size"] == 8
    assert made["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("stage", "accumulation", "overlaps"), [(1, 1, True), (1, 3, False), (2, 3, False), (3, 3, True)]
)
def test_stage_1_overlaps_where_one_backward_pass_reaches_all_gradients(
    stage: int, accumulation: int, overlaps: bool
) -> None:
    made = settings(ParallelConfig(zero_stage=stage), accumulation=accumulation, on_gpu=True)
    assert made["zero_optimization"]["overlap_comm"] == overlaps


def test_every_pass_is_reduced_by_itself_only_where_ranks_keep_shares() -> None:
    with pytest.raises(ValidationError, match="zero_stage 1 keeps gradients whole .*; remove it"):
        ParallelConfig(zero_stage=1, reduce_gradients="backward")


def test_buckets_are_even_for_a_model_with_an_odd_number_of_parameters() -> None:
    zero = settings(ParallelConfig(zero_stage=1), num_parameters=1001)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 1002


def test_a_start_does_not_import_torchs_compiler() -> None:
    """It takes longer than all else that DeepSpeed imports."""
    program = (
        "import sys, torch; from parallel.deepspeed_import import import_deepspeed;"
        "from parallel.process import initialize;"
        "initialize('cpu'); compiler = torch.compile; import_deepspeed(torch.device('cpu'));"
        "import deepspeed.runtime.zero.muon.muon_optimizer;"
        "assert torch.compile is compiler; assert 'torch._inductor.compile_fx' not in sys.modules; print('fine')"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stdout.endswith("fine\n"), result.stderr


def test_bf16_without_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match="use zero_stage 1 or more"):
        ParallelConfig(zero_stage=0, precision="bf16")
