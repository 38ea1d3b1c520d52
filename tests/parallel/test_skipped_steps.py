"""A step whose loss or gradient is not finite on one rank, or above a limit, leaves no trace: training is bit for bit
that without it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed_helper import run_ranks
from tests.parallel.skip_worker import HELD_BACK, SPOILED, WIDE

LAYOUTS = [*(f"zero{stage}-fp32" for stage in range(4)), *(f"zero{stage}-bf16" for stage in (1, 2, 3))]
LAYOUTS += ["zero3-bf16-offload", "zero3-fp32-offload"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("skips") / "seen.json"
    run_ranks(["tests/parallel/skip_worker.py", str(output), *LAYOUTS], ranks=2, timeout=300)
    return json.loads(output.read_text())


def saved(folder: Path) -> dict[str, bytes]:
    """Weights, both moments and the optimizer's count of steps, of all ranks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*SPOILED, *HELD_BACK])
def test_training_goes_on_as_if_the_step_had_never_been(seen: dict[str, Any], layout: str, case: str) -> None:
    expected, result = seen[layout]["none"], seen[layout][case]
    assert result["steps"] == expected["steps"]
    assert not any(skipped for *_, skipped in result["steps"])
    files = saved(Path(result["folder"]))
    assert len(files) >= 3 and files == saved(Path(expected["folder"]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SPOILED)
def test_a_skipped_step_says_what_was_not_finite(seen: dict[str, Any], layout: str, case: str) -> None:
    bad, (what, _) = seen[layout][case]["bad"], SPOILED[case]
    assert bad["skipped"]
    assert not math.isfinite(bad["norm"])
    assert math.isfinite(bad["loss"]) == (what == "gradient")
    # Two rows each of: micro-batch 0 of ranks 0 and 1, micro-batch 1 of ranks 0 and 1.
    assert bad["bad_rows"] == ([] if what == "gradient" else [6, 7])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", HELD_BACK)
def test_a_step_above_a_limit_says_by_how_much(seen: dict[str, Any], layout: str, case: str) -> None:
    bad = seen[layout][case]["bad"]
    assert bad["held_back"] and not bad["skipped"] and bad["bad_rows"] == []
    assert 1 < bad["loss"] < WIDE and 1e-2 < bad["norm"] < WIDE
    reference = seen["zero1-fp32"][case]["bad"]
    assert (bad["loss"], bad["norm"]) == pytest.approx((reference["loss"], reference["norm"]), rel=4e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["gradient at 0", "norm above at 0"])
def test_a_run_whose_first_step_was_skipped_can_be_saved(seen: dict[str, Any], layout: str, case: str) -> None:
    folder = Path(seen[layout][case]["folder"]) / "behind"
    assert json.loads((folder / "state.json").read_text())["optimizer_step"] == 0
