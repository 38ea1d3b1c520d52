"""Plans: counted memory is what engines hold, times follow from measured steps, and layouts that are suggested fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model import ModelConfig, TitansLM
from model.flops import flops_per_token
from parallel.deepspeed_config import deepspeed_config
from parallel.mesh import Layout
from pretrain.config import Recipe, load_recipe
from pretrain.errors import UserError
from pretrain.plan import activation_bytes
from tests.training_cases import write_recipe
from tools.bench.live_tensors import LiveTensors
from tools.bench.record import RECORDS, read_record
from tools.plan.__main__ import main
from tools.plan.cluster import DEVICES, GB, Cluster, find_device
from tools.plan.memory import rank_memory
from tools.plan.rates import Measured, Rates, calibrated, fitted, measured_steps
from tools.plan.search import _layouts, plan_layout, search
from tools.plan.timing import _pipeline_seconds, _Step, step_time

RATES = Rates(model=1e12, memory=1e11, source="made up")
TOLERANCE = 0.2
"""Of a predicted step's time."""


def recipe_with(folder: Path, **sections: Any) -> Recipe:
    return load_recipe(write_recipe(folder / "shards", folder / "run", **sections))


def cluster_of(nodes: int, gpus: int) -> Cluster:
    return Cluster(find_device("h100"), nodes, gpus)


def test_two_rates_are_found_in_steps_that_follow_them() -> None:
    steps = [
        Measured(variant, 1, model, memory, model / 4e9 + memory / 5e8)
        for variant, model, memory in (("lmm", 1e9, 2e9), ("mag", 3e9, 1e9), ("transformer", 2e9, 0.0))
    ]
    rates = fitted(steps, "here")
    assert (rates.model, rates.memory) == pytest.approx((4e9, 5e8))
    assert rates.scales == pytest.approx({"lmm": 1.0, "mag": 1.0, "transformer": 1.0})
    assert rates.seconds("mag", 8e9, 1e9) == pytest.approx((2.0, 2.0))


def test_one_kind_of_model_gives_one_rate() -> None:
    rates = fitted([Measured("lmm", 1, 1e9, 2e9, 6.0), Measured("lmm", 2, 2e9, 4e9, 12.0)], "here")
    assert rates.model == pytest.approx(rates.memory)
    assert sum(rates.seconds("lmm", 1e9, 2e9)) == pytest.approx(6.0)


def test_steps_of_two_million_tokens_are_predicted_from_short_ones() -> None:
    """Measured on two CPU cores: the time's growth with length and the segments that are computed again."""
    steps = [s for s in measured_steps(read_record(RECORDS / "long-cpu.json")) if s.variant != "transformer"]
    short, long = (
        [s for s in steps if (s.length > 65_536) == is_long and s.length > 4096] for is_long in (False, True)
    )
    assert len(short) == 6 and {s.variant for s in long} == {"mac", "mag", "lmm"}
    rates = fitted(short, "short rows")
    for step in long:
        predicted = sum(rates.seconds(step.variant, step.model, step.memory))
        assert predicted == pytest.approx(step.seconds, rel=TOLERANCE), step.variant


def test_a_record_of_another_device_is_refused() -> None:
    record = read_record(RECORDS / "long-cpu.json")
    with pytest.raises(UserError, match="measured on a CPU, and the plan is for H100"):
        calibrated(record, "H100", "fp32")
    on_gpu = record | {"settings": record["settings"] | {"device": "cuda"}, "hardware": {"gpu": "NVIDIA H100 80GB"}}
    assert calibrated(on_gpu, "H100", "fp32").source.startswith("measured: python -m tools.bench long")
    with pytest.raises(UserError, match=r"measured in fp32, and parallel\.precision is bf16"):
        calibrated(on_gpu, "H100", "bf16")
    for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL"):  # others than that of the plan
        with pytest.raises(UserError, match=f"measured on {name}, and the plan is for H100"):
            calibrated(on_gpu | {"hardware": {"gpu": name}}, "H100", "fp32")
    with pytest.raises(UserError, match="holds no training steps"):
        calibrated(on_gpu | {"name": "memory"}, "H100", "fp32")


def test_a_record_of_training_steps_counts_what_was_recomputed() -> None:
    row = {"preset": "mag-tiny", "length": 64, "batch": 3, "seconds_per_step": 2.0, "activations": "recomputed"}
    (step,) = measured_steps({"name": "train", "settings": {}, "results": [row, {"preset": "mag-tiny"}]})
    flops = flops_per_token(ModelConfig.preset("mag-tiny"), 64)
    assert step == pytest.approx(("mag", 64, 256 * flops.model, 256 * flops.memory, 2.0))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_replicas_share_what_zero_divides(tmp_path: Path, stage: int) -> None:
    recipe = recipe_with(tmp_path, parallel={"zero_stage": stage}, training={"micro_batch_size": 1})
    one, four = (rank_memory(recipe, Layout(data=ranks), 0) for ranks in (1, 4))
    numbers = TitansLM(recipe.model).num_parameters()
    assert (one.parameters, one.optimizer) == (4 * numbers, 12 * numbers)
    assert four.optimizer == 12 * numbers // 4
    assert four.parameters == (numbers if stage == 3 else 4 * numbers)
    assert one.buckets == (4 * numbers if stage == 3 else 0)


def test_tensor_ranks_and_stages_hold_their_parts(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path)
    whole = rank_memory(recipe, Layout(), 0)
    halves = [rank_memory(recipe_with(tmp_path, parallel={"tensor": 2}), Layout(tensor=2), rank) for rank in range(2)]
    assert halves[0].parameters == halves[1].parameters
    assert whole.parameters / 2 < halves[0].parameters < 0.6 * whole.parameters
    assert halves[0].activations < whole.activations
    stages = [
        rank_memory(recipe_with(tmp_path, parallel={"pipeline": 2}), Layout(pipeline=2), rank) for rank in range(2)
    ]
    tied = 4 * recipe.model.dim * recipe.model.vocab_size
    assert sum(stage.parameters for stage in stages) == whole.parameters + tied


def test_a_step_is_divided_into_what_it_is_spent_on(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, training={"micro_batch_size": 1})
    alone = step_time(recipe, Layout(), cluster_of(1, 1), RATES)
    flops = flops_per_token(recipe.model, 32)
    assert alone.compute == pytest.approx(128 * flops.model / RATES.model)
    assert alone.memory_updates == pytest.approx(128 * flops.memory / RATES.memory)
    assert alone.collectives == alone.bubble == 0
    four = step_time(recipe, Layout(data=4), cluster_of(1, 4), RATES)
    assert four.compute == pytest.approx(alone.compute / 4) and four.collectives > 0
    apart = step_time(recipe, Layout(data=4), cluster_of(4, 1), RATES)
    assert apart.collectives > 2 * four.collectives
    again = recipe_with(tmp_path, training={"micro_batch_size": 1}, parallel={"activation_checkpointing": True})
    assert step_time(again, Layout(), cluster_of(1, 1), RATES).memory_updates == pytest.approx(
        4 / 3 * alone.memory_updates
    )


@pytest.mark.parametrize(("truncate_every", "again"), [(None, 7 / 8), (1, 0), (2, 1 / 2), (4, 3 / 4)])
def test_all_segments_of_a_stretch_but_its_last_are_computed_again(
    tmp_path: Path, truncate_every: int | None, again: float
) -> None:
    exact = {} if truncate_every is None else {"gradient": "truncated", "truncate_every": truncate_every}
    recipe = recipe_with(tmp_path, training={"micro_batch_size": 1, "segment_length": 4} | exact)
    time = step_time(recipe, Layout(), cluster_of(1, 1), RATES)
    flops = flops_per_token(recipe.model, 32)
    assert time.memory_updates == pytest.approx((3 + again) / 3 * 128 * flops.memory / RATES.memory)


def test_sequence_ranks_send_a_stretch_to_the_next_stage(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path)
    whole, stretch = (
        _pipeline_seconds(_Step(recipe, layout, cluster_of(1, 4), passes=4, tokens=128, forwards=1.0))
        for layout in (Layout(pipeline=2), Layout(pipeline=2, sequence=2))
    )
    assert stretch == pytest.approx(whole / 2) and stretch > 0


def test_tensor_ranks_with_sharded_norms_send_a_stretch_to_the_next_stage(tmp_path: Path) -> None:
    whole, stretch = (
        _pipeline_seconds(
            _Step(
                recipe_with(tmp_path, parallel={"tensor": 2, "pipeline": 2, "tensor_shard_norms": sharded}),
                Layout(pipeline=2, tensor=2), cluster_of(1, 4), passes=4, tokens=128, forwards=1.0,
            )
        )
        for sharded in (False, True)
    )  # fmt: skip
    assert stretch == pytest.approx(whole / 2) and stretch > 0


def test_layouts_keep_sharded_norms_where_they_can_be(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, parallel={"tensor": 2, "tensor_shard_norms": True})
    found = {
        (fields["parallel.tensor"], fields["parallel.tensor_shard_norms"]): dropped
        for fields, dropped in ((dict(overrides), dropped) for overrides, dropped in _layouts(recipe, cluster_of(1, 2)))
    }
    assert found == {("2", "true"): (), ("1", "false"): ("tensor_shard_norms true: it belongs to tensor ranks",)}


def test_layouts_are_tried_with_sharded_norms_and_without(tmp_path: Path) -> None:
    found = {
        (fields["parallel.tensor"], fields["parallel.tensor_shard_norms"])
        for fields in (dict(overrides) for overrides, _ in _layouts(recipe_with(tmp_path), cluster_of(1, 2)))
    }
    assert found == {("1", "false"), ("2", "false"), ("2", "true")}


OF_STAGE_3 = {
    "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True, "gather_ahead_elements": 7,
    "keep_gathered_below": 5, "reduce_gradients": "backward",
}  # fmt: skip


@pytest.mark.parametrize(
    ("parallel", "kept_by"),
    [
        (OF_STAGE_3, {"parallel.zero_stage": "3"}),
        ({"pipeline": 2, "balance_stages": "parameters"}, {"parallel.pipeline": "2"}),
    ],
)
def test_options_of_the_recipes_layout_do_not_refuse_others(
    tmp_path: Path, parallel: dict[str, Any], kept_by: dict[str, str]
) -> None:
    """They are kept where a layout has them, and told of where it does not."""
    path = write_recipe(tmp_path / "shards", tmp_path / "run", training={"micro_batch_size": 1}, parallel=parallel)
    found = search(lambda overrides: load_recipe(path, list(overrides)), cluster_of(1, 2), RATES)
    assert not any("remove it" in reason for reason in found.refused), found.refused
    options = set(parallel) - {"zero_stage", "pipeline"}
    seen = set()
    for candidate in found.fitting:
        fields = dict(candidate.overrides)
        has_them = kept_by.items() <= fields.items()
        seen.add(has_them)
        dropped = {lost.split()[0] for lost in candidate.dropped}
        # ZeRO 2 sums behind every pass, too.
        expected = options - ({"reduce_gradients"} if fields["parallel.zero_stage"] == "2" else set())
        assert dropped == (set() if has_them else expected)
        for name in options - dropped:
            assert getattr(candidate.recipe.parallel, name) == parallel[name]
        for name in dropped:
            assert (
                getattr(candidate.recipe.parallel, name) == type(candidate.recipe.parallel).model_fields[name].default
            )
    assert seen == {True, False}


def test_what_a_suggestion_leaves_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parallel = {"zero_stage": 3, "offload_optimizer": True}
    path = write_recipe(tmp_path / "shards", tmp_path / "run", training={"micro_batch_size": 1}, parallel=parallel)
    assert main([str(path), "--gpus-per-node", "2", "--suggest"]) == 0
    text = capsys.readouterr().out
    assert "--parallel.offload_optimizer false" in text
    assert "    without the recipe's offload_optimizer true: it belongs to zero_stage 3" in text


def test_others_are_suggested_where_the_recipes_layout_is_not_possible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path / "shards", tmp_path / "run", training={"micro_batch_size": 1}, parallel={"tensor": 2})
    options = [str(path), "--gpus-per-node", "1"]
    assert main(options) == 2
    capsys.readouterr()
    assert main([*options, "--suggest"]) == 0
    text = capsys.readouterr().out
    assert "not as the recipe has it: 1 ranks cannot be laid out" in text and "--parallel.tensor 1" in text
    assert main([*options, "--suggest", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert "1 ranks cannot be laid out" in found["refused"] and found["fitting"]


def test_sums_that_wait_for_the_last_pass_are_waited_for(tmp_path: Path) -> None:
    """As DeepSpeed is told to overlap them; only then the backward pass hides them."""
    for rows, stage, hidden in ((1, 1, True), (2, 1, False), (1, 0, False), (2, 2, False), (1, 2, True)):
        training, parallel = {"micro_batch_size": 1, "batch_tokens": 64 * rows}, {"zero_stage": stage}
        recipe = recipe_with(tmp_path, training=training, parallel=parallel)
        slow = Rates(model=1.0, memory=1.0, source="made up")  # would hide any traffic
        time = step_time(recipe, Layout(data=2), cluster_of(1, 2), slow)
        sizes = {"micro_batch_size": 1, "accumulation": rows, "data_ranks": 2, "num_parameters": 9}
        settings = deepspeed_config(recipe.parallel, **sizes, gradient_clip=0.0, on_gpu=True)
        overlap = settings["zero_optimization"]["overlap_comm"]
        held = 4 * TitansLM(recipe.model).num_parameters() / 2 / cluster_of(1, 2).link_bytes(2)
        gathered = held if stage else 0.0
        summed = 2 * held  # of stage 1 and 2, too, by DeepSpeed: tests/tools/test_plan_traffic.py
        assert overlap is hidden
        assert time.collectives == pytest.approx(gathered + (0.0 if hidden else summed))


@pytest.mark.parametrize(("segments", "stages"), [(1, 2), (8, 2)])
def test_the_bubble_is_the_stages_share_of_the_passes(tmp_path: Path, segments: int, stages: int) -> None:
    training = {"micro_batch_size": 1} | ({"segment_length": 32 // segments} if segments > 1 else {})
    recipe = recipe_with(tmp_path, training=training, parallel={"pipeline": stages})
    time = step_time(recipe, Layout(pipeline=stages), cluster_of(1, stages), RATES)
    sequences = 4
    assert time.bubble == pytest.approx((stages - 1) / (segments * sequences) * (time.compute + time.memory_updates))


@pytest.mark.parametrize("variant", ["mag", "lmm", "transformer"])
def test_activations_are_estimated_within_a_factor_of_two(tmp_path: Path, variant: str) -> None:
    """Against the tensors that a forward and backward pass keeps alive at most."""
    model = {"preset": f"{variant}-tiny", "vocab_size": 400, "dim": 64, "num_layers": 4, "num_heads": 4, "ffn_dim": 128}
    training = {"sequence_length": 256, "batch_tokens": 512, "micro_batch_size": 2, "tokens": 512}
    path = write_recipe(tmp_path / "shards", tmp_path / "run", training=training)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": model}))
    recipe = load_recipe(path)
    language_model = TitansLM(recipe.model)
    tokens = torch.randint(400, (2, 256))
    with LiveTensors() as live:
        language_model(tokens, targets=tokens).loss_sum.backward()
    gradients = 4 * language_model.num_parameters()
    measured = live.peak_bytes - gradients
    assert 0.5 < activation_bytes(recipe, 4) / measured < 2


def test_what_is_suggested_fits_and_is_the_fastest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path / "shards", tmp_path / "run", training={"micro_batch_size": 1})
    options = [str(path), "--gpu", "H100", "--gpus-per-node", "2", "--suggest", "--json"]
    assert main(options) == 0
    (found,) = json.loads(capsys.readouterr().out)
    times = [candidate["step_seconds"]["total"] for candidate in found["fitting"]]
    assert times == sorted(times) and times[0] <= found["step_seconds"]["total"]
    assert found["speed"].startswith("assumed, not measured")
    best = [word for name, value in found["fitting"][0]["overrides"].items() for word in (f"--{name}", value)]
    assert main([*options[:-1], *best]) == 0
    text = capsys.readouterr().out
    assert "all of this is an estimate" in text and "layouts" in text


def test_what_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_with(tmp_path)
    tiny = Cluster(DEVICES["h100"].__class__("H100", 1000.0, GB), 1, 1)
    assert not plan_layout(recipe, tiny, RATES).fits(tiny)
    path = str(tmp_path / "run.yaml")
    for options, words in (
        (["--gpu", "abacus"], "nothing is known of it"),
        (["--nodes", "3", "--gpus-per-node", "1"], "not a multiple of"),
        (["--parallel.tensor", "3"], "parallel.tensor 3"),
        (["stray"], "unexpected argument 'stray'"),
    ):
        assert main([path, *options]) == 2
        assert words in capsys.readouterr().err, options
