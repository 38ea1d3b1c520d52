"""Small models of every variant as fixtures."""

from collections.abc import Callable

import pytest
from torch import Tensor

from model import TitansLM
from tests.model_cases import CASES, build_model, random_tokens


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    """Each variant and option in turn."""
    return request.param


@pytest.fixture
def small_model() -> Callable[..., TitansLM]:
    """small_model(case, dtype=float64, **overrides): a model of 2 layers of width 16, vocabulary 31."""
    return build_model


@pytest.fixture
def draw_tokens() -> Callable[..., Tensor]:
    """draw_tokens(rows, length, seed=0): random tokens of the small models' vocabulary."""
    return random_tokens
