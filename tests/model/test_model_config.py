"""Presets of the right size; wrong configurations refused with the field, the value and the fix."""

import pytest
from pydantic import ValidationError

from model import MemoryConfig, ModelConfig, TitansLM
from model.presets import PRESETS
from model.undrawn import undrawn

_TARGETS = {"170m": 170e6, "340m": 340e6, "400m": 400e6, "760m": 760e6, "1.3b": 1.3e9}


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.endswith("tiny")])
def test_a_preset_has_the_parameters_of_its_name(name) -> None:
    model = undrawn(lambda: TitansLM(ModelConfig.preset(name)))
    assert model.num_parameters() == pytest.approx(_TARGETS[name.split("-")[1]], rel=0.05)
    assert model.config.head_dim == 64


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("tiny")])
def test_tiny_presets_are_for_cpus(name) -> None:
    model = TitansLM(ModelConfig.preset(name))
    assert 0.8e6 < model.num_parameters() < 1.2e6


def test_overrides_replace_single_fields() -> None:
    config = ModelConfig.preset("mac-tiny", vocab_size=300, memory={"depth": 3})
    assert config.vocab_size == 300
    assert (config.memory.depth, config.memory.chunk) == (3, 16)
    assert ModelConfig.preset("mac-tiny", memory=MemoryConfig(depth=1, chunk=8)).memory.depth == 1
    assert ModelConfig.preset("transformer-tiny").window is None


def test_a_config_survives_json() -> None:
    for name in PRESETS:
        config = ModelConfig.preset(name)
        assert ModelConfig.model_validate_json(config.model_dump_json()) == config


def test_every_field_has_a_help_line() -> None:
    for config in (ModelConfig, MemoryConfig):
        assert all(field.description for field in config.model_fields.values())


_SMALL = {"vocab_size": 31, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16}


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"variant": "mac", "segment": 10, "memory": {"chunk": 4}}, ["segment is 10", "memory.chunk 4", "8"]),
        ({"variant": "mac", "memory": {}}, ["segment is missing", "memory.chunk 64"]),
        ({"variant": "mac", "segment": 64, "window": 9, "memory": {}}, ["window is 9", "remove"]),
        ({"variant": "mag", "memory": {}}, ["window is missing"]),
        ({"variant": "mag", "window": 8}, ["memory is missing"]),
        ({"variant": "mal", "window": 8, "segment": 64, "memory": {}}, ["segment is 64", "remove"]),
        ({"variant": "mal", "window": 8, "join": "product", "memory": {}}, ["join is product", "remove"]),
        ({"variant": "lmm", "mac_writes": "attention", "memory": {}}, ["mac_writes is attention", "remove"]),
        ({"variant": "lmm", "window": 8, "memory": {}}, ["window is 8", "no attention"]),
        ({"variant": "lmm", "num_persistent": 2, "memory": {}}, ["num_persistent is 2", "set it to 0"]),
        ({"variant": "lmm", "rope_base": 5e5, "memory": {}}, ["rope_base is 500000.0", "remove"]),
        ({"variant": "transformer", "memory": {}}, ["memory is set", "remove memory"]),
        ({"variant": "transformer", "segment": 64}, ["segment is 64"]),
        ({"variant": "transformer", "num_heads": 3}, ["dim is 16", "num_heads 3", "multiple of 3"]),
        ({"variant": "transformer", "num_heads": 16}, ["dim / num_heads is 1", "even"]),
        ({"variant": "lmm", "memory": {"depth": 5}}, ["memory.depth", "4"]),
        ({"variant": "lmm", "memory": {"initial_step": 2.0}}, ["initial_step is 2.0", "step_ceiling 1.0"]),
        ({"variant": "lmm", "memory": {}, "widow": 3}, ["widow"]),
    ],
)
def test_a_wrong_configuration_is_named(fields, parts) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate({**_SMALL, **fields})
    for part in parts:
        assert part in str(caught.value)


def test_an_unknown_preset_gets_near_names() -> None:
    with pytest.raises(ValueError, match="mac-340m"):
        ModelConfig.preset("mac-430m")


def test_the_automatic_step_bound_follows_the_chunk() -> None:
    memory = ModelConfig.preset("lmm-tiny", memory={"chunk": 4}).memory
    assert memory.step_bound == "auto"
    assert memory.bound == pytest.approx(1.25 * (1 + 1 / 2 + 1 / 3 + 1 / 4))
    assert ModelConfig.preset("lmm-tiny", memory={"step_bound": 3.0}).memory.bound == 3.0
    assert ModelConfig.preset("lmm-tiny", memory={"step_bound": None}).memory.bound is None
    with pytest.raises(ValueError, match="step_bound"):
        ModelConfig.preset("lmm-tiny", memory={"step_bound": -1.0})
