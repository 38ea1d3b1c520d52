"""ZeRO 0 to 3 on one and two processes against a plain torch loop; saving, resuming, gathering, accumulation,
clipping.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.state_files import read_parameters
from tests.distributed_helper import run_ranks
from tests.parallel import engine_worker as work

FP32 = ["zero0-fp32", "zero1-fp32", "zero2-fp32", "zero3-fp32"]
BF16 = ["zero1-bf16", "zero2-bf16", "zero3-bf16"]
FP32_OFFLOADED, BF16_OFFLOADED = ["zero3-fp32-offload"], ["zero3-bf16-offload"]
OFFLOADED = FP32_OFFLOADED + BF16_OFFLOADED


def reference() -> dict[str, Any]:
    """The same training with nothing but torch."""
    model = work.Small()
    optimizer = work.optimizer_of(model)
    losses, norms = [], []
    for step in range(work.STEPS):
        batch = work.global_batch(step)
        for group in optimizer.param_groups:
            group["lr"] = work.rate(step)
        loss = model(batch.tokens, targets=batch.targets).loss_sum / (batch.targets != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), work.CLIP)))
        optimizer.step()
        losses.append(loss.item())
    held_out = work.global_batch(99)
    with torch.no_grad():
        output = model(held_out.tokens, targets=held_out.targets, with_correct=True)
    evaluated = (output.loss_sum.item(), int(output.correct.sum()))
    weights = {name: p.detach().flatten() for name, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "evaluated": evaluated, "weights": weights}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return reference()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    results = {}
    for ranks, layouts in ((1, [*FP32, "zero1-bf16", "zero3-bf16"]), (2, FP32 + BF16 + OFFLOADED)):
        output = tmp_path_factory.mktemp("engine") / "seen.json"
        run_ranks(["tests/parallel/engine_worker.py", str(output), *layouts], ranks=ranks, timeout=300)
        results[ranks] = json.loads(output.read_text())
    return results


@pytest.mark.parametrize(
    ("ranks", "layout"), [*((1, layout) for layout in FP32), *((2, layout) for layout in FP32 + FP32_OFFLOADED)]
)
def test_every_layout_follows_a_plain_loop(
    seen: dict[int, Any], plain: dict[str, Any], ranks: int, layout: str
) -> None:
    result = seen[ranks][layout]
    assert result["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert result["norms"] == pytest.approx(plain["norms"], rel=1e-4)
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(torch.tensor(result["weights"][name]), weight, rtol=1e-4, atol=1e-5)


def test_clipping_is_exercised(plain: dict[str, Any]) -> None:
    assert max(plain["norms"]) > work.CLIP


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_are_counted_over_all_ranks(seen: dict[int, Any], ranks: int) -> None:
    expected = [int((work.global_batch(step).targets != -100).sum()) for step in range(work.STEPS)]
    assert all(result["tokens"] == expected for result in seen[ranks].values())


@pytest.mark.parametrize("layout", FP32 + BF16 + OFFLOADED)
def test_a_resumed_run_repeats_every_bit(seen: dict[int, Any], layout: str) -> None:
    result = seen[2][layout]
    assert result["resumed"] == result["losses"][work.STEPS // 2 :]
    assert result["resumed_norms"] == result["norms"][work.STEPS // 2 :]
    assert result["resumed_weights_equal"]


@pytest.mark.parametrize("layout", FP32 + FP32_OFFLOADED)
def test_more_and_smaller_micro_batches_are_the_same_step(seen: dict[int, Any], layout: str) -> None:
    assert seen[2][layout]["accumulated"] == pytest.approx(seen[2][layout]["losses"][:4], rel=1e-5)


@pytest.mark.parametrize("layout", BF16 + BF16_OFFLOADED)
def test_bf16_stays_near_fp32(seen: dict[int, Any], plain: dict[str, Any], layout: str) -> None:
    assert seen[2][layout]["losses"] == pytest.approx(plain["losses"], rel=4e-2)
    assert seen[2][layout]["norms"][0] == pytest.approx(plain["norms"][0], rel=1e-2)


@pytest.mark.parametrize("layout", FP32)
def test_evaluation_admits_ranks_with_different_numbers_of_batches(
    seen: dict[int, Any], plain: dict[str, Any], layout: str
) -> None:
    loss, tokens, correct, positions = seen[2][layout]["evaluated"]
    batches = 1 + 3
    expected_loss, expected_correct = plain["evaluated"]
    assert loss == pytest.approx(batches * expected_loss, rel=1e-4)
    assert correct == batches * expected_correct
    assert tokens == batches * int((work.global_batch(99).targets != -100).sum())
    assert positions is None


def test_layer_statistics_are_the_mean_over_ranks(seen: dict[int, Any]) -> None:
    sizes = [seen[2][layout]["stats"][0]["size"] for layout in FP32]
    assert sizes == pytest.approx([sizes[0]] * len(sizes), rel=1e-4)
    assert all(result["stats"][1] == {} for result in seen[2].values())


@pytest.mark.parametrize("layout", FP32 + BF16)
def test_the_saved_weights_are_readable_on_one_process(seen: dict[int, Any], layout: str) -> None:
    folder = Path(seen[2][layout]["folder"])
    saved = read_parameters(folder)
    shapes = {name: p.shape for name, p in work.Small().named_parameters()}
    assert {name: value.shape for name, value in saved.items()} == shapes
    assert all(value.dtype == torch.float32 for value in saved.values())


UNCOUNTED = """
from parallel.process import exit_now, initialize, shutdown
from tests.parallel.engine_worker import build, own_rows
world = initialize("cpu")
engine, batches = build(world, "zero1-fp32", 2), own_rows(world, 0, 2)
for batch in batches:
    batch.targets.fill_(-100)
result = engine.train_step(batches, 1e-3)
print(float(result.loss), float(result.grad_norm), int(result.tokens), result.skipped)
shutdown()
exit_now(0)
"""


def test_a_step_in_which_no_target_counts_has_no_loss_and_is_no_bad_one() -> None:
    assert run_ranks(["-c", UNCOUNTED], ranks=1, timeout=60).outputs == ["0.0 0.0 0 False\n"]
