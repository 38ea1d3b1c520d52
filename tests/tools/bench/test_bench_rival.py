"""The comparison with titans-pytorch, with a package of its name and interface in its place."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from tools.bench import rival
from tools.bench.__main__ import main
from tools.bench.rival import LAYER, MEMORY, RIVAL, best_of_rounds

STAND_IN = """
import torch

class NeuralMemory(torch.nn.Module):
    def __init__(self, dim, dim_head, heads, chunk_size, momentum, mem_model_norm_add_residual, default_model_kwargs):
        super().__init__()
        assert dim == dim_head * heads and momentum and not mem_model_norm_add_residual
        assert default_model_kwargs == {"depth": 2, "expansion_factor": 2.0}
        self.linear = torch.nn.Linear(dim, dim)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, seq):
        return self.linear(seq), None
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch) -> None:
    """A titans-pytorch 0.5.5 that this process and its workers find."""
    folder = tmp_path / "packages"
    (folder / "titans_pytorch").mkdir(parents=True)
    (folder / "titans_pytorch" / "__init__.py").write_text(STAND_IN)
    information = folder / "titans_pytorch-0.5.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: titans-pytorch\nVersion: 0.5.5\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", RIVAL, "--backends", "dual"], "--backends: not with --against"),
        (["--exact-lengths", "16"], "--exact-lengths: belongs to --against"),
        (["--exact-lengths"], "--exact-lengths: belongs to --against"),
        (["--rounds", "2"], "--rounds: belongs to --against"),
    ],
)
def test_an_option_that_would_do_nothing_is_an_error(words, said, stand_in, capsys) -> None:
    assert main(["memory", "--device", "cpu", *words]) == 2
    assert said in capsys.readouterr().err


def test_both_are_measured_in_turns_and_compared(stand_in, tmp_path, capsys) -> None:
    output = tmp_path / "record.json"
    sizes = ["--heads", "2", "--head-dim", "8", "--expansion", "2", "--chunk-size", "16", "--lengths", "32"]
    options = ["--exact-lengths", "--rounds", "1", "--repeats", "1", "--threads", "1", "--device", "cpu"]
    assert main(["memory", "--against", RIVAL, *sizes, *options, "--record", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["name"] == "against" and record["versions"][RIVAL] == record["settings"]["version"] == "0.5.5"
    rows = {row["implementation"]: row for row in record["results"]}
    assert set(rows) == {RIVAL, LAYER, MEMORY}
    theirs, ours = rows[RIVAL], rows[LAYER]
    speed = (theirs["forward_s"] + theirs["backward_s"]) / (ours["forward_s"] + ours["backward_s"])
    assert ours["speed_over_rival"] == pytest.approx(speed)
    assert theirs["speed_over_rival"] == 1
    assert "projections" in capsys.readouterr().out


def test_turns_alternate_and_chunk_1_has_lengths_of_its_own(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.5")
    monkeypatch.setattr(rival, "run_cases", lambda *words, **_: iter(seen.extend(words[1]) or ()))
    main(["memory", "--against", RIVAL, "--rounds", "2", "--device", "cpu", "--record", os.devnull])
    assert [case["implementation"] for case in seen] == [RIVAL, LAYER, MEMORY] * 4
    assert [(case["length"], case["rival_chunk_size"]) for case in seen[::6]] == [(4096, 64), (1024, 1)]
    assert {case["chunk_size"] for case in seen} == {64}


def test_a_package_that_is_missing_is_an_error_with_the_fix(monkeypatch, capsys) -> None:
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert main(["memory", "--against", RIVAL, "--device", "cpu"]) == 2
    assert "pip install titans-pytorch==0.5.5" in capsys.readouterr().err


def test_several_values_are_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.5")
    assert main(["memory", "--against", RIVAL, "--chunk-size", "16", "32", "--device", "cpu"]) == 2
    assert "--chunk-size" in capsys.readouterr().err


def row(implementation: str, forward: float, backward: float, peak: int) -> dict:
    case = {"implementation": implementation, "length": 8, "rival_chunk_size": 64}
    times = {"forward_s": forward, "backward_s": backward, "us_per_token": forward + backward}
    return {**case, **times, "peak_bytes": peak}


def test_the_fastest_turn_counts_and_the_most_memory() -> None:
    theirs, ours = best_of_rounds(
        [row(RIVAL, 2, 4, 800), row(LAYER, 1, 1, 90), row(RIVAL, 3, 3, 700), row(LAYER, 2, 0.5, 100)]
    )
    assert (theirs["forward_s"], theirs["backward_s"], theirs["peak_bytes"]) == (2, 3, 800)
    assert (ours["forward_s"], ours["backward_s"], ours["peak_bytes"]) == (1, 0.5, 100)
    assert ours["speed_over_rival"] == pytest.approx(5 / 1.5) and ours["memory_over_rival"] == 0.125
    assert ours["turns_s"] == [2, 2.5]


def test_a_turn_that_failed_is_not_left_out_of_the_result() -> None:
    failed = {**row(RIVAL, 0, 0, 0), "outcome": "failed", "why": "?"}
    theirs, ours = best_of_rounds([row(RIVAL, 2, 4, 800), row(LAYER, 1, 1, 90), failed])
    assert theirs["outcome"] == "failed" and "speed_over_rival" not in ours
