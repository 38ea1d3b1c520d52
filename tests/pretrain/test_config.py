"""Recipes: what is read, what overrides do, and that every mistake is named with its fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from parallel.segments import Segments
from pretrain.config import Recipe, load_recipe
from pretrain.errors import UserError
from pretrain.strict_yaml import load_yaml
from tests.training_cases import recipe_fields, write_recipe

NO_SHARDS = {"data.validation": "null"}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write_recipe(Path("shards"), tmp_path / "run")


def refused(path: Path, *overrides: tuple[str, str]) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides).batches(1)
    return str(caught.value)


def test_a_recipe_written_out_is_the_same_recipe(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("tokens", ["1Mi", "2M", "null"])
def test_a_long_held_out_row_takes_as_many_tokens(recipe_file: Path, tokens: str) -> None:
    recipe = load_recipe(recipe_file, [("evaluation.context", "1Mi"), ("evaluation.tokens", tokens)])
    assert recipe.evaluation.context == 2**20


def test_overrides_reach_every_depth(recipe_file: Path) -> None:
    overrides = [
        ("optimizer.lr", "4e-4"),
        ("training.tokens", "15B"),
        ("training.batch_tokens", "0.064Mi".replace("0.064Mi", "64Ki")),
        ("model.memory.depth", "3"),
        ("model.preset", "mac-170m"),
        ("data.validation", "null"),
        ("evaluation", "{}"),
        ("name", "17"),
    ]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.optimizer.lr == 4e-4
    assert recipe.training.tokens == 15_000_000_000
    assert recipe.training.batch_tokens == 65536
    assert recipe.model.memory is not None
    assert recipe.model.memory.depth == 3
    assert recipe.model.memory.chunk == 8, "the recipe's own change to the preset stays"
    assert recipe.data.validation is None
    assert recipe.name == "17"


def test_a_misspelt_field_gets_its_nearest_name_and_the_list(recipe_file: Path) -> None:
    message = refused(recipe_file, ("training.mirco_batch_size", "2"))
    assert "training.mirco_batch_size: unknown; did you mean micro_batch_size?" in message
    assert "known: tokens, sequence_length, batch_tokens, micro_batch_size" in message


def test_a_misspelt_section_and_a_misspelt_memory_field_are_found(recipe_file: Path) -> None:
    message = refused(recipe_file, ("optimiser.lr", "1"), ("model.memory.chunk_size", "4"))
    assert "optimiser: unknown; did you mean optimizer?" in message
    assert "model.memory.chunk_size: unknown; did you mean chunk?" in message


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("optimizer.lr", "fast", "optimizer.lr: 'fast' does not fit"),
        ("optimizer.lr", "-1", "optimizer.lr: -1 does not fit"),
        ("optimizer.betas", "[0.9, 2]", "optimizer.betas.1: 2 does not fit"),
        ("training.tokens", "many", "training.tokens: 'many' does not fit: write a whole number of tokens"),
        ("parallel.zero_stage", "4", "parallel.zero_stage: 4 does not fit"),
        ("schedule.kind", "linear", "schedule.kind: 'linear' does not fit"),
        ("schedule.warmup_tokens", "1M", "schedule.warmup_tokens 1000000 exceed training.tokens 1536"),
        ("model.segment", "20", "segment is 20, memory.chunk 8"),
        ("model.num_heads", "5", "num_heads 5: heads must divide"),
        ("model.preset", "mac-12b", "model.preset is 'mac-12b'"),
        ("data.validation", "null", "data.validation is not"),
        ("logging.memory_every_steps", "7", None),
        ("training", "4", "training: 4 does not fit"),
        ("training.tokens.x", "4", "tokens is a value, not a section"),
        ("name", "[", "quote it"),
        ("model.preset", "5", "model.preset is 5: it must be one of"),
        ("model.preset", "null", "model.preset is None: it must be one of"),
        ("model.preset", "[mac-tiny]", "model.preset is ['mac-tiny']: it must be one of"),
        ("seed", "-1", "seed: -1 does not fit"),
        ("data.seed", "-1", "data.seed: -1 does not fit"),
        ("data.seed", str(2**63), f"data.seed: {2**63} does not fit"),
    ],
)
def test_a_value_that_does_not_fit_is_named(recipe_file: Path, field: str, value: str, expected: str | None) -> None:
    if expected is None:  # 7 is a multiple of every_steps 1
        assert load_recipe(recipe_file, [(field, value)]).logging.memory_interval == 7
    else:
        assert expected in refused(recipe_file, (field, value))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.memory.depth": "1", "model.memory.expansion": "4"}, "model.memory: memory.expansion is 4, but"),
        ({"model.memory.depth": "1", "model.memory.activation": "gelu"}, "memory.activation is gelu, but memory.depth"),
        ({"model.memory.momentum": "false", "model.memory.initial_momentum": "0.5"}, "initial_momentum is 0.5, but"),
        ({"model.memory.forgetting": "false", "model.memory.initial_forgetting": "0.1"}, "initial_forgetting is 0.1"),
        ({"model.memory.forgetting": "false", "model.memory.forget_to": "zero"}, "forget_to is zero, but"),
        ({"model.memory.convolution": "1"}, "or 0 for none"),
        ({"parallel.keep_gathered_below": "0"}, "keep_gathered_below is 0, but only zero_stage 3"),
        ({"parallel.gather_ahead_elements": "5"}, "gather_ahead_elements is 5, but only zero_stage 3"),
        ({"evaluation": "{tokens: 5}", "data.validation": "null"}, "evaluation.tokens is set but data.validation"),
        ({"evaluation": "{context: 2Mi}", **NO_SHARDS}, "evaluation.context is set but data.validation is not"),
        ({"evaluation": "{by_position: true}", **NO_SHARDS}, "evaluation.by_position is set but data.validation"),
        ({"evaluation": "{reset_window: 16}", **NO_SHARDS}, "evaluation.reset_window is set but data.validation"),
        ({"evaluation.reset_window": "16"}, "evaluation.reset_window is set, but by_position is not: set it to true"),
        (
            {"evaluation": "{by_position: true, reset_window: 24}"},
            "evaluation.reset_window 24 is not a multiple of the model's segment of 16 tokens: 16 or 32 would be",
        ),
        (
            {"evaluation": "{by_position: true, reset_window: 32}"},
            "evaluation.reset_window 32 resets nothing in rows of 32 tokens",
        ),
        (
            {"evaluation": "{context: 64}", "data": "{kind: synthetic, task: {kind: recall}}"},
            "evaluation.context is 64, but drawn rows are as long as data.task makes them",
        ),
        (
            {"evaluation": "{context: 1Mi}"},
            "evaluation.tokens 1000000 is less than one row of evaluation.context 1048576: raise it to 1048576",
        ),
        ({"schedule": "{kind: constant, min_lr_ratio: 0.5}"}, "min_lr_ratio is unused with kind constant"),
        ({"optimizer.lr": ".inf"}, "optimizer.lr: inf does not fit"),
        ({"optimizer.betas": "[.nan, 0.9]"}, "optimizer.betas.0: nan does not fit"),
        ({"model.memory.step_bound": ".inf"}, "model.memory.step_bound: inf does not fit"),
        ({"parallel.timeout_minutes": ".inf"}, "parallel.timeout_minutes: inf does not fit"),
        (
            {
                "model.variant": "lmm",
                "model.segment": "null",
                "model.num_persistent": "0",
                "parallel.attention_backend": "math",
            },
            "parallel.attention_backend is math, but model.variant lmm has no attention",
        ),
        ({"parallel.attention_backend": "fast"}, "parallel.attention_backend: 'fast' does not fit"),
        ({"training.gradient": "truncated"}, "gradient is truncated, but without segment_length rows are run whole"),
        ({"training.truncate_every": "2"}, "truncate_every is 2, but without segment_length"),
        ({"training.boundary_states": "disk"}, "boundary_states is disk, but without segment_length"),
        ({"training.segment_length": "12"}, "segment_length 12 does not divide sequence_length 32: 8 or 16 would"),
        ({"training.segment_length": "64"}, "segment_length 64 does not divide sequence_length 32: 32 would"),
        (
            {"training.segment_length": "8", "training.truncate_every": "2"},
            "truncate_every is 2, but gradient is exact: make it truncated, or remove truncate_every",
        ),
        (
            {"training.segment_length": "8", "training.gradient": "truncated"},
            "gradient is truncated, but truncate_every is not set",
        ),
        (
            {
                "training.segment_length": "8",
                "training.gradient": "truncated",
                "training.truncate_every": "1",
                "training.boundary_states": "host",
            },
            "boundary_states is host, but gradients flow through one segment only",
        ),
        (
            {"training.segment_length": "32", "training.boundary_states": "disk"},
            "boundary_states is disk, but gradients flow through one segment only",
        ),
        ({"training.segment_length": "8", "training.gradient": "none"}, "training.gradient: 'none' does not fit"),
        ({"training.segment_length": "8", "training.truncate_every": "0"}, "training.truncate_every: 0 does not fit"),
        (
            {"data.reset_memory": "true", "training.segment_length": "8"},
            "training.segment_length 8 is not a multiple of model.segment 16, where documents begin (data.reset_memory "
            "is on): make it 16, or another multiple",
        ),
        (
            {"data.order": "streams", "training.sequence_length": "40", "training.batch_tokens": "160"},
            "training.sequence_length 40 is not a multiple of model.segment 16, where documents begin (data.order is "
            "streams): make it 32, or another multiple",
        ),
        (
            {"data.reset_memory": "true", "model": "{preset: lmm-tiny, memory: {chunk: 24}}"},
            "training.sequence_length 32 is not a multiple of model.memory.chunk 24",
        ),
        (
            {"data.order": "streams", "model": "{preset: transformer-tiny}"},
            "full attention's grows with every token: set model.window",
        ),
        ({"parallel.sequence": "2"}, "parallel.sequence is 2, but model.variant is mac"),
        (
            {
                "parallel.sequence": "2",
                "training.sequence_length": "31",
                "training.batch_tokens": "62",
                "model": "{preset: mag-tiny, vocab_size: 400}",
            },
            "parallel.sequence 2 does not divide training.sequence_length 31",
        ),
        (
            {
                "parallel.sequence": "2",
                "evaluation.by_position": "true",
                "evaluation.reset_window": "15",
                "model": "{preset: lmm-tiny, vocab_size: 400, memory: {chunk: 5}}",
            },
            "parallel.sequence 2 does not divide evaluation.reset_window 15",
        ),
        (
            {"data.long_documents": "{at_least: 10, share: 0.5}", "data.min_document_tokens": "10"},
            "long_documents.at_least is 10, min_document_tokens 10: every document is long",
        ),
        ({"data.long_documents": "{at_least: 10, share: 0}"}, "data.long_documents.share: 0 does not fit"),
        ({"data.long_documents": "{at_least: 10, share: 1.5}"}, "data.long_documents.share: 1.5 does not fit"),
        ({"data.long_documents.share": "0.5"}, "data.long_documents.at_least: missing"),
        ({"data.order": "stream"}, "data.order: 'stream' does not fit"),
    ],
)
def test_a_value_without_effect_or_bound_is_refused(
    recipe_file: Path, overrides: dict[str, str], expected: str
) -> None:
    assert expected in refused(recipe_file, *overrides.items())


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.memory.depth": "1", "model.memory.momentum": "false", "model.memory.forgetting": "false"},
        {"schedule": "{kind: constant}", "data.validation": "null", "evaluation": "{}"},
        {"model": "{preset: delta-tiny, vocab_size: 400}"},
        {"data.reset_memory": "true", "training.segment_length": "16"},
        {"data.reset_memory": "true", "training.sequence_length": "31", "training.batch_tokens": "62"}
        | {"model": "{preset: transformer-tiny, vocab_size: 400}"},
        {"data.order": "streams", "data.long_documents": "{at_least: 4Ki, share: 0.5}"},
        {"data.order": "streams", "model": "{preset: transformer-tiny, window: 64, vocab_size: 400}"},
    ],
)
def test_what_is_left_unused_may_be_written_out(recipe_file: Path, tmp_path: Path, overrides: dict[str, str]) -> None:
    recipe = load_recipe(recipe_file, list(overrides.items()))
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe


def test_bf16_without_zero_is_refused_with_the_reason(recipe_file: Path) -> None:
    message = refused(recipe_file, ("parallel.zero_stage", "0"), ("parallel.precision", "bf16"))
    assert "parallel: zero_stage 0 with precision bf16" in message
    assert "use zero_stage 1" in message


def test_a_missing_field_is_named_with_what_it_is(tmp_path: Path) -> None:
    fields = recipe_fields(Path("shards"), tmp_path / "run")
    del fields["training"]["tokens"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    assert "training.tokens: missing; add it to the recipe or give --training.tokens" in refused(path)


@pytest.mark.parametrize(
    ("text", "expected"), [("a: [", "cannot be read as YAML"), ("- 1", "expected sections"), ("", "expected")]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert expected in refused(path)
    assert "No such file" in refused(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nname: a\nseed: 2\n", "'seed' stands twice in one section, in lines 1 and 3"),
        ("optimizer:\n  lr: 1\n  eps: 1\n  lr: 2\n", "'lr' stands twice in one section, in lines 2 and 4"),
        ("name: 2026-02-31\n", "day is out of range"),
    ],
)
def test_a_key_that_is_written_twice_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert expected in refused(path)


def test_a_key_that_replaces_a_merged_one_is_no_second_one() -> None:
    assert load_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")["b"] == {"x": 3, "y": 2}


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("name: é".encode("latin-1"))
    assert "recipe.yaml is not UTF-8 text" in refused(path)


@pytest.mark.parametrize(
    ("ranks", "rows", "batch", "fits"),
    [(1, 2, 100, "64 or 128 would fit"), (3, 2, 128, "; 192 would fit"), (8, 4, 1000, "; 1024 would fit")],
)
def test_a_batch_that_cannot_be_divided_says_what_would_fit(
    recipe_file: Path, ranks: int, rows: int, batch: int, fits: str
) -> None:
    overrides = [("training.batch_tokens", str(batch)), ("training.micro_batch_size", str(rows))]
    with pytest.raises(UserError, match=fits):
        load_recipe(recipe_file, overrides).batches(ranks)


def test_the_division_of_a_step_is_derived(recipe_file: Path) -> None:
    overrides = [("training.batch_tokens", "256"), ("training.tokens", "1000"), ("training.micro_batch_size", "2")]
    batches = load_recipe(recipe_file, overrides).batches(2)
    assert (batches.rows, batches.accumulation, batches.steps, batches.total_tokens) == (8, 2, 4, 1024)


def test_rows_are_cut_as_the_recipe_says(recipe_file: Path) -> None:
    assert load_recipe(recipe_file).segments("device") is None
    exact = load_recipe(recipe_file, [("training.segment_length", "8")])
    assert exact.segments("disk") == Segments(8, 4, None, "disk", exact.folder)
    assert exact.batches(1) == load_recipe(recipe_file).batches(1), "micro-batches are whole rows, however they are run"
    overrides = [("segment_length", "0.03125Ki"), ("gradient", "truncated"), ("truncate_every", "7")]
    truncated = load_recipe(recipe_file, [(f"training.{name}", value) for name, value in overrides])
    assert truncated.segments("device") == Segments(32, 1, 7, "device", truncated.folder)


def test_every_field_has_a_docstring() -> None:
    from pretrain.recipe_errors import sections_in

    def undocumented(section: type, prefix: str) -> list[str]:
        missing = []
        for name, field in section.model_fields.items():
            if not field.description:
                missing.append(prefix + name)
            for inner in sections_in(field.annotation):
                missing += undocumented(inner, f"{prefix}{name}.")
        return missing

    assert undocumented(Recipe, "") == []


def test_a_value_that_fits_none_of_several_types_is_one_line(tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write_recipe(tmp_path, tmp_path / "run"), [("model.memory.step_bound", "abc")])
    (line,) = str(caught.value).splitlines()[1:]
    assert "model.memory.step_bound: 'abc' does not fit" in line
    assert "or: Input should be 'auto'" in line
