"""What a merged memory knows of two documents, by a small model that was trained to recall."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import ModelConfig, TitansLM
from parallel.state_files import load_parameters
from pretrain.checkpoints import list_checkpoints
from pretrain.data.synthetic.task import ASK, NUM_SPECIAL
from tests.training_cases import pretrain
from tools.sessions import Session, merge_sessions

ROOT = Path(__file__).parents[2]
ROWS, PAIRS, KEYS, VALUES = 64, 4, 32, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TitansLM:
    """That of the recall recipe: it reads 8 pairs in a row and is asked for 4 of their values."""
    folder = tmp_path_factory.mktemp("run")
    pretrain(ROOT / "launch/recipes/trials/recall.yaml", "--folder", str(folder / "run"), timeout=1200)
    checkpoint = list_checkpoints(folder / "run" / "checkpoints")[0]
    found = TitansLM(ModelConfig.model_validate_json((checkpoint / "model.json").read_text()))
    load_parameters(found, checkpoint)
    return found.eval()


def documents(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two documents of 4 pairs, [2, 4, 2], whose keys all differ; keys and values as tokens."""
    keys = torch.randperm(KEYS, generator=generator)[: 2 * PAIRS] + NUM_SPECIAL
    values = torch.randint(VALUES, (2 * PAIRS,), generator=generator) + NUM_SPECIAL + KEYS
    return torch.stack((keys, values), 1).view(2, PAIRS, 2).unbind(0)


@torch.no_grad()
def right(model: TitansLM, session: Session, document: Tensor) -> int:
    """How many of a document's values are the likeliest where its keys are asked, one at a time."""
    found = 0
    for key, value in document.tolist():
        logits = model(torch.tensor([[ASK, key]]), session.state).logits
        found += int(logits[0, -1].argmax()) == value
    return found


@torch.no_grad()
def read(model: TitansLM, *documents: Tensor) -> Session:
    tokens = torch.cat([document.flatten() for document in documents])[None]
    return Session(model(tokens).state, tokens[:, :0], tokens.shape[1])


@pytest.mark.slow
def test_a_merged_memory_recalls_both_documents_better_than_chance(model: TitansLM) -> None:
    """The shares of right answers are printed; tools/huggingface/README.md has what came out."""
    counts = dict.fromkeys(("own", "other", "both in turn", "merged", "merged 3:1, first", "merged 3:1, second"), 0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(ROWS):
        first, second = documents(generator)
        one, two = read(model, first), read(model, second)
        both, merged = read(model, first, second), merge_sessions([one, two], model)
        uneven = merge_sessions([one, two], model, [3, 1])
        counts["own"] += right(model, one, first) + right(model, two, second)
        counts["other"] += right(model, one, second) + right(model, two, first)
        counts["both in turn"] += right(model, both, first) + right(model, both, second)
        counts["merged"] += right(model, merged, first) + right(model, merged, second)
        counts["merged 3:1, first"] += 2 * right(model, uneven, first)
        counts["merged 3:1, second"] += 2 * right(model, uneven, second)
    shares = {name: count / (2 * PAIRS * ROWS) for name, count in counts.items()}
    print(json.dumps(shares))
    assert shares["own"] > 0.8
    assert shares["other"] < 0.1
    assert shares["merged"] > 0.5
    assert shares["merged 3:1, first"] > shares["merged 3:1, second"] > 2 * shares["other"]
