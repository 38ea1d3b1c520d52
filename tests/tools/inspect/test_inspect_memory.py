"""What a memory holds: numbers against plain linear algebra, sessions behind their open chunk, starts, the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tools.huggingface.exported_cases import random_ids, write_exported
from tests.tools.inspect.page_structure import Structure
from tools.inspect.__main__ import main
from tools.inspect.contents import effective_rank, of_memory
from tools.inspect.memory_page import html_page
from tools.model_directory import load_model_directory
from tools.sessions import Session, save_session


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mal") / "model"
    write_exported(folder, "mal")
    return folder


def matrices(seed: int = 0, depth: int = 2) -> tuple[list[torch.Tensor], ...]:
    """Weights, start and momentum of 3 heads of 6."""
    generator = torch.Generator().manual_seed(seed)
    widths = [6, *[9] * (depth - 1), 6]
    return tuple(
        [torch.randn(3, a, b, generator=generator) for a, b in zip(widths, widths[1:], strict=False)] for _ in range(3)
    )


def test_numbers_are_those_of_plain_linear_algebra() -> None:
    weights, start, momentum = matrices()
    found = of_memory(5, weights, start, momentum)
    assert [(x.layer, x.head, x.matrix) for x in found] == [(5, head, at) for head in range(3) for at in range(2)]
    for x in found:
        w, w0, s = (tensors[x.matrix][x.head].double().numpy() for tensors in (weights, start, momentum))
        fields = dict(x.fields())
        values = np.linalg.svd(w - w0, compute_uv=False)
        shares = values / values.sum()
        np.testing.assert_allclose(fields["norm"], np.linalg.norm(w))
        np.testing.assert_allclose(fields["top"], np.linalg.norm(w, 2))
        np.testing.assert_allclose(fields["momentum"], np.linalg.norm(s))
        np.testing.assert_allclose(fields["distance"], np.linalg.norm(w - w0))
        np.testing.assert_allclose(fields["relative_distance"], np.linalg.norm(w - w0) / np.linalg.norm(w0))
        np.testing.assert_allclose(fields["saturation"], np.exp(-(shares * np.log(shares)).sum()) / 6)


def test_effective_rank_of_known_spectra() -> None:
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(np.zeros(3)) is None and effective_rank(np.array([np.nan])) is None


def test_a_memory_fills_up_as_it_is_written_to() -> None:
    """One association fills one direction, as many as there are fill all."""
    start = [torch.zeros(1, 8, 8)]
    one = torch.outer(torch.arange(8.0), torch.ones(8))[None]
    filled = [x.saturation for w in (one, torch.eye(8)[None]) for x in of_memory(0, [w], start, start)]
    assert filled == [pytest.approx(1 / 8), pytest.approx(1.0)]
    assert of_memory(0, start, start, start)[0].saturation is None


@torch.no_grad()
@pytest.mark.parametrize("length", [8, 11])
def test_a_session_is_looked_at_behind_all_its_tokens(exported: Path, tmp_path: Path, length: int) -> None:
    """11 tokens end inside a chunk of 4, whose tokens count: as in a model whose last chunk is of 3 tokens."""
    model, tokens = load_model_directory(exported).model, random_ids(1, length)
    state = model(tokens).state
    save_session(tmp_path / "session", Session(state, tokens[:, :0], length), model)
    arguments = ["--model", str(exported), "--json", str(tmp_path / "found.json")]
    assert main(["memory", str(tmp_path / "session"), *arguments]) == 0
    [row] = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(row) == 2 * 2 * 2
    moved = max(x["distance"] for x in row)
    for x in row:
        weights = state.layers[x["layer"]].memory.memory.weights[x["matrix"]][0, x["head"]]
        start = dict(model.named_parameters())[f"blocks.{x['layer']}.mixer.first.memory.core.initial_{x['matrix']}"]
        at_chunk = (weights - start[x["head"]]).norm().item()
        assert len(x["singular_values"]) == len(x["changes"]) == min(weights.shape)
        if length == 8:
            assert x["distance"] == pytest.approx(at_chunk, rel=1e-4)
        else:
            assert abs(x["distance"] - at_chunk) > 1e-3 * moved


def test_a_model_stands_at_its_start(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["memory", str(exported), "--json", str(tmp_path / "x.json"), "--output", str(tmp_path / "x.html")]) == 0
    )
    [row] = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert all(x["distance"] == 0 and x["saturation"] is None and x["norm"] > 0 for x in row)
    assert "effective rank" in capsys.readouterr().out
    found = Structure((tmp_path / "x.html").read_text())
    assert len(found.all("tr")) == 2 + 1 + len(row) and len(found.all("img")) == 2 and not found.all("script")
    assert all((image["src"] or "").startswith("data:image/svg+xml;base64,") for image in found.all("img"))


def test_a_session_that_has_read_nothing_stands_at_the_start(exported: Path, tmp_path: Path) -> None:
    model = load_model_directory(exported).model
    save_session(tmp_path / "session", Session(model.initial_state(2), random_ids(2, 1), 0), model)
    arguments = ["--model", str(exported), "--json", str(tmp_path / "found.json")]
    assert main(["memory", str(tmp_path / "session"), *arguments]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(rows) == 2 and all(x["distance"] == 0 for row in rows for x in row)


def test_the_page_shows_what_is_not_finite() -> None:
    weights, start, momentum = matrices(depth=1)
    weights[0][1, 0, 0] = torch.nan
    found = of_memory(0, weights, start, momentum)
    page = html_page("<x>", [("of", "a & b")], [found, found])
    assert Structure(page).texts["h1"] == "<x>" and page.count("nan") >= 2
