"""Small models exported without a training, and loaded by transformers."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from model import ModelConfig, TitansLM
from tests.data_cases import make_tokenizer
from tests.model_cases import CASES
from tools.model_directory import write_model_directory

VOCABULARY = 400
SIZES = {"vocab_size": VOCABULARY, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24}
VARIANTS = tuple(CASES)
ORIGIN = {"sequence_length": 64, "step": 3, "tokens": 768, "data_fingerprint": "0" * 64}


def trained_model(case: str) -> TitansLM:
    """A model of 2 layers of width 16 whose weights are all off their starts."""
    torch.manual_seed(1)
    model = TitansLM(ModelConfig.model_validate({**SIZES, **CASES[case]}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def write_exported(
    folder: Path, case: str, *, tokenizer: Path | None = None, diverged: bool = False, **options: Any
) -> TitansLM:
    """Exports `trained_model` to a folder and returns it; `diverged`: its weights are no numbers."""
    model = trained_model(case)
    if diverged:
        for parameter in model.parameters():
            parameter.detach().fill_(torch.nan)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text("name: test\n")
    write_model_directory(
        folder,
        {name: parameter.detach() for name, parameter in model.named_parameters()},
        tokenizer=tokenizer or make_tokenizer(folder.parent, VOCABULARY),
        recipe=recipe,
        overwrite=False,
        model=model.config,
        **ORIGIN,
        **options,
    )
    return model


@cache
def offline_transformers(modules: Path) -> Any:
    """The transformers package, kept from the network, with copies of models' code in the folder `modules`."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules), "TRANSFORMERS_VERBOSITY": "error"}
    import transformers

    return transformers


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Tokens that are text, not control."""
    return torch.randint(4, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
