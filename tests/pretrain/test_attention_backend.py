"""`parallel.attention_backend`: it reaches the model, and one that can't compute its attention is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.attention import AttentionLayer
from parallel.process import World
from pretrain import loop
from pretrain.config import load_recipe
from pretrain.errors import UserError
from tests.training_cases import write_recipe


def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str) -> torch.nn.Module:
    """The model that is handed to the engine."""
    monkeypatch.setattr(loop, "Engine", lambda model, *arguments, **options: model)
    recipe = load_recipe(write_recipe(Path("shards"), tmp_path / "run"), [("parallel.attention_backend", backend)])
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    return loop.build_engine(recipe, recipe.batches(1), world)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_it_reaches_every_layer(backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = built(monkeypatch, tmp_path, backend)
    assert [m.backend for m in model.modules() if isinstance(m, AttentionLayer)] == [backend, backend]


def test_one_that_does_not_take_the_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        built(monkeypatch, tmp_path, "flash")
    message = str(caught.value)
    assert message.startswith("parallel.attention_backend: attention backend 'flash' does not take this attention: ")
    assert "second stream" in message
    assert "choose 'auto'" in message
