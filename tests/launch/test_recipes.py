"""Every shipped recipe loads as it is, asks for what its name says, and fits common numbers of GPUs."""

import re
from pathlib import Path

import pytest
import torch

from model import ModelConfig, TitansLM
from pretrain.config import load_recipe

FOLDER = Path(__file__).parents[2] / "launch" / "recipes"
SUITE = FOLDER / "trials" / "suite.yaml"  # what is done with the trials' recipes: tests/tools/trials
RECIPES = sorted(set(FOLDER.rglob("*.yaml")) - {SUITE})
TRIALS = [path for path in RECIPES if path.parent.name == "trials"]
PAPER = [path for path in RECIPES if path.stem.startswith("titans-")]
VARIANTS = ("mac", "mag", "mal", "lmm", "transformer")
TOKENS = {"170m": 15e9, "340m": 15e9, "400m": 15e9, "760m": 30e9, "1.3b": 30e9}
PARAMETERS = {"170m": 170e6, "340m": 340e6, "400m": 400e6, "760m": 760e6, "1.3b": 1.3e9}


def parameters(config: ModelConfig) -> int:
    """Parameters of a model that is built without memory for them."""
    with torch.device("meta"):
        return TitansLM(config).num_parameters()


def test_the_demo_and_all_sizes_of_the_paper_are_there():
    assert {path.stem for path in set(RECIPES) - set(TRIALS)} == {"demo", *(f"titans-{size}" for size in TOKENS)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_survives_being_written_out(path, tmp_path):
    recipe = load_recipe(path)
    written = tmp_path / "recipe.yaml"
    written.write_text(recipe.to_yaml())
    assert load_recipe(written) == recipe


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_variant_has_the_size_in_the_recipe_s_name(path, variant):
    size = path.stem.removeprefix("titans-")
    recipe = load_recipe(path, [("model.preset", f"{variant}-{size}")])
    assert recipe.model.variant == variant
    assert parameters(recipe.model) == pytest.approx(PARAMETERS[size], rel=0.05)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_paper_s_numbers_are_those_of_the_paper(path):
    recipe = load_recipe(path)
    assert recipe.training.tokens == TOKENS[path.stem.removeprefix("titans-")]
    assert recipe.training.sequence_length == 4096
    assert recipe.training.batch_tokens == pytest.approx(0.5e6, rel=0.05)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.schedule.kind) == (4e-4, 0.1, "cosine")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_step_divides_over_common_numbers_of_gpus(path, ranks):
    assert load_recipe(path).batches(ranks).accumulation >= 1


def test_the_demo_divides_over_two_processes():
    path = next(path for path in RECIPES if path.stem == "demo")
    assert load_recipe(path).batches(2).steps > 100


@pytest.mark.parametrize("path", TRIALS, ids=lambda path: path.stem)
def test_a_trial_is_of_a_size_for_a_cpu_and_measured_on_the_way(path):
    recipe = load_recipe(path)
    assert recipe.data.has_held_out and recipe.parallel.device == "cpu"
    assert parameters(recipe.model) < 1e6
    assert recipe.evaluation.every_tokens is not None


@pytest.mark.parametrize("path", TRIALS, ids=lambda path: path.stem)
def test_a_trial_s_rows_are_full_and_its_steps_as_many_as_it_says(path):
    recipe = load_recipe(path)
    steps, rows = recipe.batches(1).steps, recipe.batches(1).rows
    assert f"tokens: {recipe.training.tokens:_} # {steps} steps" in path.read_text()
    if recipe.data.kind == "synthetic":
        assert recipe.training.sequence_length == recipe.data.task.row_tokens
        assert f"# {rows} rows" in path.read_text()


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_what_the_comment_offers_can_be_loaded(path):
    """The overrides in the recipe's own comment are right."""
    offer = re.search(r"Another variant: (.+?) \(", path.read_text())
    assert offer is not None
    words = offer[1].split()
    overrides = [(name.removeprefix("--"), value) for name, value in zip(words[::2], words[1::2], strict=True)]
    assert load_recipe(path, overrides).model.variant == "mag"
