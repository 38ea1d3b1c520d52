"""Mixtures in recipes: phases that change weights, fields on the command line, help, and errors that name the field."""

import pytest
import yaml

from pretrain.command_line import fields_help, parse
from pretrain.config import load_recipe
from pretrain.errors import UserError
from pretrain.phases import load_phases
from tests.training_cases import recipe_fields

SOURCES = {"web": {"train": "a", "weight": 0.7}, "code": {"train": "b", "weight": 0.3, "max_epochs": 4}}


@pytest.fixture
def write(tmp_path):
    """Writes a recipe on sources, with phases where they are given."""

    def recipe(sources=SOURCES, phases=None, **data):
        fields = recipe_fields(tmp_path, tmp_path / "run", evaluation={"every_tokens": None, "tokens": 1_000_000})
        fields["data"] = {"sources": sources, **data}
        fields |= {} if phases is None else {"phases": phases}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields))
        return path

    return recipe


def test_a_phase_changes_a_weight_and_adds_a_source(write, tmp_path):
    later = {"code": {"weight": 0.5}, "books": {"train": "c", "weight": 0.1, "min_document_tokens": "32Ki"}}
    phases = load_phases(write(phases=[{"name": "first"}, {"name": "long", "data": {"sources": later}}]))
    first, second = (phase.recipe.data.sources for phase in phases)
    assert {name: source.weight for name, source in first.items()} == {"web": 0.7, "code": 0.3}
    assert {name: source.weight for name, source in second.items()} == {"web": 0.7, "code": 0.5, "books": 0.1}
    assert second["books"].min_document_tokens == 32768 and second["code"].max_epochs == 4
    again = tmp_path / "again.yaml"
    again.write_text(phases.to_yaml())
    assert load_phases(again) == phases


def test_a_source_is_set_on_the_command_line(write):
    recipe = load_recipe(write(), [("data.sources.code.weight", "0.9"), ("data.sources.web.max_epochs", "1.5")])
    assert recipe.data.sources["code"].weight == 0.9 and recipe.data.sources["web"].max_epochs == 1.5


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"web": {"train": "a", "wieght": 1}}, r"data.sources.web.wieght: unknown; did you mean weight\?"),
        (
            {"web": {"train": "a"}},
            "data.sources.web.weight: missing; add it to the recipe or give --data.sources",
        ),
        ({"web": {"train": "a", "weight": "much"}}, "data.sources.web.weight: 'much' does not fit"),
        ({}, "data: train is missing: give --data.train FOLDER, or sources"),
    ],
)
def test_what_is_wrong_with_a_source_is_named(write, sources, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(sources))


def test_help_lists_the_fields_of_a_source():
    text = fields_help()
    for field in ("train", "weight", "min_document_tokens", "max_epochs"):
        assert f"--data.sources.NAME.{field} " in text
    for field in ("packing stream|best_fit", "on_damage stop|skip", "allow_changed BOOL"):
        assert f"--data.{field}" in text


def test_a_switch_needs_no_value(write):
    path = write()
    for words in (["--data.allow_changed"], ["--data.allow_changed", "--seed", "3"], ["--data.allow_changed", "true"]):
        overrides = dict(parse([str(path), *words]).overrides)
        assert overrides["data.allow_changed"] == "true"
        assert load_recipe(path, list(overrides.items())).data.allow_changed
    assert dict(parse(["--data.allow_changed", str(path)]).overrides) == {"data.allow_changed": "true"}
    with pytest.raises(UserError, match="--seed has no value"):
        parse([str(path), "--seed"])
