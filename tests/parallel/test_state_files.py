"""The saved state is read by parameter: from any number of rank files, and never when something is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from parallel.state_files import KINDS, StateReader, Stretch, load_parameters, read_parameters, write_index, write_rank


def write(folder: Path, model: nn.Module, cuts: list[float]) -> None:
    """Save `model` as len(cuts) + 1 ranks that each hold a consecutive share of every parameter."""
    ranks = len(cuts) + 1
    for rank in range(ranks):
        stretches = []
        for name, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            edges = [0, *(int(cut * len(flat)) for cut in cuts), len(flat)]
            for number, kind in enumerate(KINDS):
                values = flat[edges[rank] : edges[rank + 1]] + number
                if len(values):
                    stretches.append(Stretch(kind, name, edges[rank], values))
        write_rank(folder, rank, ranks, stretches)
    write_index(folder, ranks=ranks, optimizer_step=7, shapes={n: p.shape for n, p in model.named_parameters()})


@pytest.mark.parametrize("cuts", [[], [0.5], [0.1, 0.3, 0.31]])
def test_any_split_reads_back_whole(tmp_path: Path, cuts: list[float]) -> None:
    model = nn.Linear(5, 7)
    write(tmp_path, model, cuts)
    saved = read_parameters(tmp_path)
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())
    with StateReader(tmp_path) as reader:
        assert reader.optimizer_step == 7
        assert torch.equal(reader.read("exp_avg", "weight", 3, 20), model.weight.flatten()[3:23] + 1)


def test_a_missing_rank_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, nn.Linear(4, 4), [0.5])
    (tmp_path / "state-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="state-00001-of-00002.safetensors is missing"):
        read_parameters(tmp_path)


def test_a_state_with_a_hole_is_refused(tmp_path: Path) -> None:
    write(tmp_path, nn.Linear(4, 4), [])
    write_rank(tmp_path, 0, 1, [Stretch(kind, "weight", 1, torch.zeros(15)) for kind in KINDS])
    with pytest.raises(ValueError, match="weight of weight is not whole"):
        read_parameters(tmp_path)


def test_another_model_is_refused_by_parameter(tmp_path: Path) -> None:
    write(tmp_path, nn.Linear(4, 4), [])
    with pytest.raises(ValueError, match=r"weight: \(4, 4\) in the checkpoint, \(4, 5\) in the model"):
        load_parameters(nn.Linear(5, 4), tmp_path)
