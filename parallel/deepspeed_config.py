"""The one function that writes DeepSpeed's configuration. Nothing else in the project spells a DeepSpeed option."""

from __future__ import annotations

from typing import Any

from parallel.config import ParallelConfig


def deepspeed_config(
    config: ParallelConfig,
    *,
    micro_batch_size: int,
    accumulation: int,
    data_ranks: int,
    gradient_clip: float,
    num_parameters: int,
    on_gpu: bool,
) -> dict[str, Any]:
    """DeepSpeed's configuration as a dict.

    Everything whose default would change the training is written out: DeepSpeed's own default clips gradients to 1.0.

    Args:
        micro_batch_size: sequences of one rank in one backward pass.
        accumulation: backward passes in one optimizer step.
        data_ranks: ranks that see different data.
        gradient_clip: largest global gradient norm; 0.0 turns clipping off.
        num_parameters: bounds the buckets, which are allocated whole.
        on_gpu: overlap communication with the backward pass (needs streams).
    """
    whole = config.keeps_gradients_whole(accumulation)
    # Gradients that wait whole for one reduction are what stage 1 is.
    stage = 1 if config.zero_stage == 2 and whole else config.zero_stage
    # Where it overlaps, stage 1 reduces what the last backward pass reaches, and would lose what only others did.
    overlap = on_gpu and stage > 0 and not (stage == 1 and accumulation > 1)
    if stage == 3 and whole:
        accumulation = 1  # to it all backward passes within `reduced_once` are one
    bucket = min(config.bucket_elements, num_parameters)
    bucket += bucket % 2  # ZeRO 1 and 2 refuse odd ones
    ahead = min(config.gather_ahead_elements, num_parameters)
    # Without ZeRO in fp32 DeepSpeed reports no gradient norm: the engine clips by itself there.
    clip_inside = gradient_clip if config.zero_stage > 0 else 0.0
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_scatter": True,
        "contiguous_gradients": True,
        "overlap_comm": overlap,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": ahead,
            "stage3_max_live_parameters": 2 * ahead,
            "stage3_max_reuse_distance": 2 * ahead,
            "stage3_param_persistence_threshold": config.keep_gathered_below,
        }
    to_host = {"device": "cpu", "pin_memory": on_gpu}
    if config.offload_optimizer:
        zero["offload_optimizer"] = to_host
    if config.offload_parameters:
        zero["offload_param"] = to_host
    return {
        "train_batch_size": micro_batch_size * accumulation * data_ranks,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_inside,
        "prescale_gradients": False,
        "zero_optimization": zero,
        # Its own Adam for the host is compiled at the start, by a compiler that may not be there; torch's is taken.
        "zero_force_ds_cpu_optimizer": False,
        # Each bf16 gradient goes into its fp32 sum as it comes: none is kept, or counted, twice.
        # A gradient that is not finite is looked for in bf16 too: the step is left out then, and nothing changes.
        "bf16": {"enabled": config.precision == "bf16", "immediate_grad_update": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "wall_clock_breakdown": False,
        "steps_per_print": 2**62,
    }
