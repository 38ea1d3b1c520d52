"""A training that is saved in one layout and goes on in another is the training that nobody interrupted: every axis,
ZeRO stage and number of ranks, rows' states included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from parallel.mesh import Layout
from parallel.state_files import StateReader
from tests.distributed_helper import run_ranks
from tests.parallel.layout_worker import LENGTH, model_of
from tests.parallel.layouts import Trial
from tools.checkpoint.reshape import rank_shares

WORKER = "tests/parallel/reshape_worker.py"
STREAMS = ("mag", "streams")


class Pair(NamedTuple):
    before: Trial
    after: Trial

    def __str__(self) -> str:
        return f"{self.before}>{self.after}"


def pairs(case: str, mode: str, layouts: Sequence[dict[str, int]]) -> list[Pair]:
    """Each layout, and then the next."""
    trials = [Trial(case, mode, **layout) for layout in layouts]
    return [Pair(*two) for two in zip(trials, trials[1:], strict=False)]


ON_TWO = [
    *pairs(
        *STREAMS,
        [{}, {"data": 2}, {"tensor": 2}, {"pipeline": 2}, {"sequence": 2}, {"data": 2, "stage": 3}, {"pipeline": 2}],
    ),
    *pairs("mac", "streams", [{"tensor": 2}, {"data": 2, "stage": 2}, {"tensor": 2, "stage": 3}]),
    *pairs("lmm", "whole", [{"sequence": 2, "stage": 3}, {"tensor": 2, "stage": 0}, {"data": 2}]),
]
"""One and two ranks."""

ON_MORE = [
    *pairs(
        *STREAMS,
        [
            {"data": 2, "tensor": 2},
            {"pipeline": 2, "sequence": 2},
            {"sequence": 2, "tensor": 2, "stage": 3},
            {"pipeline": 2, "tensor": 2},
            {"sequence": 2},
            {"pipeline": 2, "data": 2},
            {},
            {"pipeline": 2, "sequence": 2, "tensor": 2},
            {"data": 2, "sequence": 2, "tensor": 2, "stage": 2},
            {"data": 2, "pipeline": 2, "tensor": 2},
            {"tensor": 2},
        ],
    ),
    *pairs("transformer-window", "segments", [{"pipeline": 2, "data": 2}, {"tensor": 2, "data": 2}, {}]),
]
"""Up to eight ranks."""


def run_pairs(listed: Sequence[Pair], folder: Path) -> tuple[dict[Pair, dict[str, Any]], dict[Trial, dict[str, Any]]]:
    """The second half of each pair, and, alone, both halves in one process of each training."""
    alone = {Pair(trial, trial) for pair in listed for trial in (pair.before.alone,)}
    everything = [*listed, *alone]
    first = list(dict.fromkeys(pair.before for pair in everything))
    seen = launch([(trial.ranks, str(trial)) for trial in first], folder)
    seen |= launch([(pair.after.ranks, str(pair)) for pair in everything], folder)
    return {pair: seen[str(pair)] for pair in listed}, {pair.after: seen[str(pair)] for pair in alone}


def launch(tasks: Sequence[tuple[int, str]], folder: Path) -> dict[str, dict[str, Any]]:
    """What each task saw; those of as many ranks in one launch."""
    by_ranks: dict[int, list[str]] = defaultdict(list)
    for ranks, task in tasks:
        by_ranks[ranks].append(task)
    seen: dict[str, dict[str, Any]] = {}
    for ranks, listed in by_ranks.items():
        output = folder / "seen.pt"
        run_ranks([WORKER, str(output), str(folder), *listed], ranks=ranks, timeout=1500)
        seen |= torch.load(output)
    return seen


def assert_goes_on(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, norms and final parameters are those of one process to 1e-5; of parameters, against the largest."""
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=0)
    assert found["parameters"].keys() == expected["parameters"].keys()
    for name, whole in expected["parameters"].items():
        assert relative(found["parameters"][name], whole) < 1e-5, name


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("reshape")
    return *run_pairs(ON_TWO, folder), folder


@pytest.mark.parametrize("pair", ON_TWO, ids=str)
def test_a_training_goes_on_in_another_layout(on_two: Any, pair: Pair) -> None:
    seen, alone, _ = on_two
    assert_goes_on(seen[pair], alone[pair.before.alone])


@pytest.mark.parametrize("pair", ON_TWO, ids=str)
def test_every_element_is_saved_once(on_two: Any, pair: Pair) -> None:
    """The files hold no more than weights and moments, whatever several ranks hold alike."""
    folder = on_two[2] / str(pair.before)
    with StateReader(folder) as reader:
        elements = sum(shape.numel() for shape in reader.shapes.values())
        assert str(reader.layout) == f"pipeline {pair.before.pipeline} x data {pair.before.data} x sequence " + (
            f"{pair.before.sequence} x tensor {pair.before.tensor}"
        )
    written = sum(path.stat().st_size for path in folder.glob("state-*.safetensors"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("state-*.safetensors"))
    assert written - headers == 12 * elements


@pytest.mark.parametrize("pair", ON_TWO, ids=str)
def test_what_each_rank_writes_is_told_beforehand(on_two: Any, pair: Pair) -> None:
    """So that a checkpoint can be rewritten for ranks that are not there."""
    assert_foretold(on_two[0][pair]["written"], pair.after)


def assert_foretold(written: list[list[str]], trial: Trial) -> None:
    layout = Layout(trial.pipeline, trial.data, trial.sequence, trial.tensor)
    config = model_of(trial).config
    for rank, found in enumerate(written):
        told = rank_shares(config, layout, rank, trial.stage, context=LENGTH)
        assert sorted(found) == sorted(f"{s.parameter} {s.part} {s.start} {s.numel}" for s in told)


@pytest.mark.slow
def test_trainings_go_on_in_layouts_of_up_to_eight_ranks(tmp_path: Path) -> None:
    seen, alone = run_pairs(ON_MORE, tmp_path)
    for pair in ON_MORE:
        assert_goes_on(seen[pair], alone[pair.before.alone])
        assert_foretold(seen[pair]["written"], pair.after)
