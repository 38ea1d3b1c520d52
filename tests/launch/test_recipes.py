"""Every shipped recipe loads as it is, asks for what its name says, and fits common numbers of GPUs."""

import re
from pathlib import Path

import pytest

from pretrain.config import load_recipe
from pretrain.phases import load_phases
from pretrain.plan import num_parameters

FOLDER = Path(__file__).parents[2] / "launch" / "recipes"
SUITE = FOLDER / "trials" / "suite.yaml"  # what is done with the trials' recipes: tests/tools/trials
RECIPES = sorted(set(FOLDER.rglob("*.yaml")) - {SUITE})
LONG = [path for path in RECIPES if path.stem.startswith("long-")]
LENGTHS = {"4k": 2**12, "32k": 2**15, "128k": 2**17, "512k": 2**19, "2m": 2**21}
TRIALS = [path for path in RECIPES if path.parent.name == "trials"]
PAPER = [path for path in RECIPES if path.stem.startswith("titans-")]
VARIANTS = ("mac", "mag", "mal", "lmm", "transformer")
TOKENS = {"170m": 15e9, "340m": 15e9, "400m": 15e9, "760m": 30e9, "1.3b": 30e9}
PARAMETERS = {"170m": 170e6, "340m": 340e6, "400m": 400e6, "760m": 760e6, "1.3b": 1.3e9}


def test_the_demo_and_all_sizes_of_the_paper_are_there():
    assert {path.stem for path in set(RECIPES) - {*TRIALS, *LONG}} == {"demo", *(f"titans-{size}" for size in TOKENS)}
    assert {path.stem for path in LONG} == {"long-tiny", "long-340m", "long-760m"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_survives_being_written_out(path, tmp_path):
    phases = load_phases(path)
    written = tmp_path / "recipe.yaml"
    written.write_text(phases.to_yaml())
    assert load_phases(written) == phases


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_variant_has_the_size_in_the_recipe_s_name(path, variant):
    size = path.stem.removeprefix("titans-")
    recipe = load_recipe(path, [("model.preset", f"{variant}-{size}")])
    assert recipe.model.variant == variant
    assert num_parameters(recipe.model) == pytest.approx(PARAMETERS[size], rel=0.05)


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
    assert num_parameters(recipe.model) < 1e6
    assert recipe.evaluation.every_tokens is not None


@pytest.mark.parametrize("path", TRIALS, ids=lambda path: path.stem)
def test_a_trial_s_rows_are_full_and_its_steps_as_many_as_it_says(path):
    recipe = load_recipe(path)
    steps, rows = recipe.batches(1).steps, recipe.batches(1).rows
    assert f"tokens: {recipe.training.tokens:_} # {steps} steps" in path.read_text()
    if recipe.data.kind == "synthetic":
        assert recipe.training.sequence_length == recipe.data.task.row_tokens
        assert f"# {rows} rows" in path.read_text()


@pytest.mark.parametrize("path", LONG, ids=lambda path: path.stem)
def test_long_recipes_go_from_4k_to_2m_by_exact_gradients(path):
    phases = load_phases(path)
    assert {phase.name: phase.recipe.training.sequence_length for phase in phases} == LENGTHS
    for phase in phases:
        recipe = phase.recipe
        assert recipe.training.gradient == "exact"
        assert (recipe.training.segment_length is None) == (phase.number == 1)
        # A segment takes no more memory than the first phase's micro-batch does.
        first = phases.run.training
        assert (recipe.training.segment_length or 0) <= first.micro_batch_size * first.sequence_length
    assert phases[4].recipe.training.boundary_states == ("disk" if path.stem == "long-tiny" else "auto")


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
@pytest.mark.parametrize("path", [path for path in LONG if path.stem != "long-tiny"], ids=lambda path: path.stem)
def test_long_recipes_show_what_the_memory_gives_beyond_the_first_phase(path, variant):
    phases = load_phases(path, [("model.preset", f"{variant}-{path.stem.removeprefix('long-')}")])
    for phase in phases:
        evaluation, training = phase.recipe.evaluation, phase.recipe.training
        assert evaluation.by_position and evaluation.tokens >= 2 * training.sequence_length
        assert evaluation.reset_window == (None if phase.number == 1 else phases.run.training.sequence_length)


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
@pytest.mark.parametrize("path", [path for path in LONG if path.stem != "long-tiny"], ids=lambda path: path.stem)
def test_long_recipes_begin_as_the_papers_and_are_for_8_gpus(path, variant):
    size = path.stem.removeprefix("long-")
    phases = load_phases(path, [("model.preset", f"{variant}-{size}")])
    paper = load_recipe(FOLDER / f"titans-{size}.yaml", [("model.preset", f"{variant}-{size}")])
    first = phases.run
    for section in ("model", "data", "training", "optimizer", "schedule", "parallel"):
        assert getattr(first, section) == getattr(paper, section), section
    for ranks in (1, 2, 4, 8):
        phases.require_fit(ranks)


def test_the_tiny_long_recipe_draws_rows_as_long_as_its_phases():
    phases = load_phases(FOLDER / "long-tiny.yaml")
    assert num_parameters(phases.run.model) < 1e5
    for phase in phases:
        assert phase.recipe.data.kind == "synthetic"
        assert phase.recipe.data.task.row_tokens == phase.recipe.training.sequence_length
        assert phase.batches(1).total_tokens == phase.recipe.training.tokens


@pytest.mark.parametrize("path", [*PAPER, *(p for p in LONG if p.stem != "long-tiny")], ids=lambda path: path.stem)
def test_what_the_comment_offers_can_be_loaded(path):
    """The overrides in the recipe's own comment are right."""
    offer = re.search(r"Another variant: (.+?) \(", path.read_text())
    assert offer is not None
    words = offer[1].split()
    overrides = [(name.removeprefix("--"), value) for name, value in zip(words[::2], words[1::2], strict=True)]
    assert load_phases(path, overrides).run.model.variant == "mag"
