"""Whole training runs of a small MAC on real shards: layouts agree, killed runs go on bit for bit, bf16, logs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.config import load_recipe
from pretrain.schedule import learning_rate
from tests.distributed_helper import run_ranks
from tests.training_cases import events, losses, pretrain, write_recipe

STEPS = 20
STAGES = (1, 2, 3)
WORKER = "tests/pretrain/train_worker.py"
VARIANTS = ("mag", "mal", "lmm", "transformer")
CONSTANT = {"kind": "constant", "warmup_tokens": 0}


def layout(stage: int) -> dict[str, Any]:
    """ZeRO 3 with recomputed activations, so that their meeting is tested too."""
    return {"zero_stage": stage, "activation_checkpointing": stage == 3}


def variant_fields(variant: str) -> dict[str, Any]:
    """Changes to the small MAC's recipe that make it another variant, with an output head of its own."""
    fields: dict[str, Any] = {"preset": f"{variant}-tiny", "segment": None, "tie_embeddings": False}
    if variant == "lmm":
        fields["num_persistent"] = 0
    if variant == "transformer":
        fields["memory"] = None
    return fields


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two launches: on one process zero0; on two zero1, zero2, zero3, and bf16 ones in one go and stopped half-way."""
    folder = tmp_path_factory.mktemp("runs")
    alone = [write_recipe(data, folder / "zero0", steps=STEPS, parallel={"zero_stage": 0})]
    alone.append(write_recipe(data, folder / "one-row", steps=STEPS, training={"micro_batch_size": 1}))
    run_ranks([WORKER, *map(str, alone)], ranks=1)
    together = [write_recipe(data, folder / f"zero{s}", steps=STEPS, parallel=layout(s)) for s in STAGES]
    for stage in (1, 3):
        bf16 = {"precision": "bf16", "zero_stage": stage}
        for name, steps in ((f"bf16-{stage}", 6), (f"bf16-{stage}-resumed", 3), (f"bf16-{stage}-resumed", 6)):
            path = write_recipe(data, folder / name, steps=steps, parallel=bf16, schedule=CONSTANT)
            together.append(path.rename(folder / f"{name}-{steps}-steps.yaml"))
    for variant in VARIANTS:
        for stage in (1, 3):
            path = folder / f"{variant}-{stage}"
            together.append(write_recipe(data, path, steps=3, parallel=layout(stage), model=variant_fields(variant)))
    run_ranks([WORKER, *map(str, together)], ranks=2, timeout=300)
    return folder


@pytest.mark.parametrize("run", ["zero1", "zero2", "zero3", "one-row"])
def test_every_layout_follows_one_process(runs: Path, run: str) -> None:
    expected = losses(runs / "zero0")
    assert len(expected) == STEPS
    assert losses(runs / run) == pytest.approx(expected, rel=1e-5)
    norms = {e["step"]: e["gradient_norm"] for e in events(runs / "zero0", "step")}
    assert {e["step"]: e["gradient_norm"] for e in events(runs / run, "step")} == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_the_same_with_its_parameters_shared_out(runs: Path, variant: str) -> None:
    expected = losses(runs / f"{variant}-1")
    assert len(expected) == 3
    assert losses(runs / f"{variant}-3") == pytest.approx(expected, rel=1e-5)


def test_the_loss_falls(runs: Path) -> None:
    seen = losses(runs / "zero0")
    assert seen[STEPS] < seen[1] - 0.3


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_killed_run_goes_on_bit_for_bit(data: Path, runs: Path, tmp_path: Path, stage: int) -> None:
    folder = tmp_path / "run"
    recipe = write_recipe(data, folder, steps=STEPS, parallel=layout(stage))
    killed = pretrain(recipe, ranks=2, check=False, kill_when=lambda: len(losses(folder)) >= 10)
    assert set(killed.codes) == {-9}
    assert not events(folder, "done")
    # Another number of loader workers as well: the order of the data must not depend on it.
    resumed = pretrain(recipe, "--data.num_workers", str(stage - 1), ranks=2)
    assert resumed.codes == [0, 0]
    (resume,) = events(folder, "resume")
    assert 4 <= resume["step"] <= 12
    assert losses(folder) == losses(runs / f"zero{stage}")
    assert evaluations(folder) == evaluations(runs / f"zero{stage}")


def evaluations(folder: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(folder, "eval")}


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_runs_and_resumes_bit_for_bit(runs: Path, stage: int) -> None:
    whole = losses(runs / f"bf16-{stage}")
    assert losses(runs / f"bf16-{stage}-resumed") == whole
    assert whole[6] < whole[1]


def test_another_layout_goes_on_from_the_same_checkpoint(data: Path, runs: Path, tmp_path: Path) -> None:
    """Saved by ZeRO 3 on two ranks, continued by ZeRO 1 on one."""
    folder = tmp_path / "run"
    shutil.copytree(runs / "zero3" / "checkpoints" / "step-00000016", folder / "checkpoints" / "step-00000016")
    pretrain(write_recipe(data, folder, steps=STEPS, parallel={"zero_stage": 1}))
    expected = {step: loss for step, loss in losses(runs / "zero0").items() if step > 16}
    assert losses(folder) == pytest.approx(expected, rel=1e-5)


def test_the_rate_follows_the_schedule(data: Path, runs: Path) -> None:
    recipe = load_recipe(runs / "zero0.yaml")
    expected = [learning_rate(recipe.schedule, 3e-3, 128 * step, 128 * STEPS) for step in range(1, STEPS + 1)]
    assert [e["learning_rate"] for e in events(runs / "zero1", "step")] == expected


def test_only_the_newest_checkpoints_are_kept(runs: Path) -> None:
    folder = runs / "zero1" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000016", "step-00000020"]
    assert (folder / "latest").read_text() == "step-00000020\n"


def test_events_tell_the_run(runs: Path) -> None:
    kinds = [event["event"] for event in events(runs / "zero1") if event["event"] not in ("step", "save", "straggler")]
    assert kinds == ["start", "preflight", "eval", "eval", "memory", "eval", "done"]
    assert [event["step"] for event in events(runs / "zero1", "save")] == [4, 8, 12, 16, 20], "told when written"
    assert [event["event"] for event in events(runs / "zero1")][-2:] == ["save", "done"]
    (start,) = events(runs / "zero1", "start")
    assert start["backends"]["attention"].startswith("sdpa: ") and start["backends"]["memory"].startswith("dual: ")
    (memory,) = events(runs / "zero1", "memory")
    assert [set(layer) >= {"alpha", "eta", "theta"} for layer in memory["layers"]] == [True, True]


def test_tensorboard_has_the_curves(runs: Path) -> None:
    curves = read_curves(runs / "zero1")
    assert len(curves["train/loss"]) == STEPS
    names = {"train/learning_rate", "train/gradient_norm", "speed/tokens_per_second", "speed/flops"}
    left = [
        point.value * speed.value
        for point, speed in zip(curves["run/seconds_left"], curves["speed/tokens_per_second"], strict=True)
    ]
    assert left == pytest.approx([128 * (STEPS - step) for step in range(1, STEPS + 1)], rel=1e-5)
    assert names | {"device/peak_memory_gigabytes", "evaluation/loss", "evaluation/bits_per_byte"} <= curves.keys()
    for layer in ("layer00", "layer01"):
        for statistic in ("alpha", "eta", "theta", "surprise", "weight_norm"):
            assert f"memory/{statistic}/{layer}" in curves
    assert not any("mfu" in name for name in curves), "a CPU has no peak that is known"


def read_curves(folder: Path) -> dict[str, Any]:
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: reader.Scalars(name) for name in reader.Tags()["scalars"]}
