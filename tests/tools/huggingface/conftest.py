"""Exported models of every variant, as transformers loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model import TitansLM
from tests.data_cases import make_tokenizer
from tests.tools.huggingface.exported_cases import VARIANTS, VOCABULARY, offline_transformers, write_exported


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The transformers package."""
    return offline_transformers(tmp_path_factory.mktemp("modules"))


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCABULARY)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Callable[[str], tuple[Path, TitansLM]]:
    """exported(case): the folder of an exported model, and the model that was exported; once a session each."""
    made: dict[str, tuple[Path, TitansLM]] = {}

    def make(case: str) -> tuple[Path, TitansLM]:
        if case not in made:
            folder = tmp_path_factory.mktemp("exported") / case
            made[case] = folder, write_exported(folder, case, tokenizer=tokenizer_path)
        return made[case]

    return make


@pytest.fixture(scope="session")
def loaded(hf: Any, exported: Callable[[str], tuple[Path, TitansLM]]) -> Callable[[str], tuple[Any, TitansLM]]:
    """loaded(case): the model that transformers loads from the folder, and the one that was exported."""
    made: dict[str, tuple[Any, TitansLM]] = {}

    def make(case: str) -> tuple[Any, TitansLM]:
        if case not in made:
            folder, own = exported(case)
            made[case] = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval(), own
        return made[case]

    return make


@pytest.fixture(params=VARIANTS)
def case(request: pytest.FixtureRequest) -> str:
    """Each variant and option in turn."""
    return request.param
