"""Rows scored in pieces against whole rows: losses by position, the memory carried and reset, in float64."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from model import ModelConfig, ModelState, TitansLM
from model.presets import PRESETS
from parallel.scoring import (
    IGNORED,
    PositionLoss,
    PositionSums,
    Rows,
    mean_reset,
    read_in_pieces,
    require_reset_window,
)
from tests.model_cases import build_model, random_tokens

WINDOW = 16
"""A whole number of every small model's chunks and segments."""
LENGTH = 3 * WINDOW + 5
NO_TAILS = {"depth": 2, "expansion": 2, "chunk": 4, "convolution": 0}


def draw(rows: int = 2, length: int = LENGTH) -> Rows:
    """Rows some of whose targets do not count."""
    drawn = random_tokens(rows, length + 1)
    targets = drawn[:, 1:].clone()
    targets[0, 3:20] = IGNORED
    return Rows(drawn[:, :-1], targets)


def read_with(model: TitansLM, calls: list[tuple[int, int]] | None = None):
    """What `read_in_pieces` asks for: the losses of each target."""

    def read(rows: Rows, state: ModelState | None, more: bool):
        if calls is not None:
            calls.append(tuple(rows.tokens.shape))
        losses, after = model.token_losses(rows.tokens, rows.targets, state)
        return losses, after if more else None

    return read


def losses_of(model: TitansLM, rows: Rows, length: int | None, window: int | None = None) -> tuple[Tensor, Tensor]:
    """All losses [B, T], carried and reset."""
    pieces = list(read_in_pieces(rows, read_with(model), length=length, reset_window=window))
    assert [piece.start for piece in pieces] == [0, *torch.tensor([p.targets.shape[1] for p in pieces]).cumsum(0)[:-1]]
    carried = torch.cat([piece.carried for piece in pieces], 1)
    return carried, carried if window is None else torch.cat([piece.reset for piece in pieces], 1)


def whole_losses(model: TitansLM, rows: Rows) -> Tensor:
    """-log p of each target from all logits at once."""
    log_p = model(rows.tokens).logits.log_softmax(-1)
    losses = -log_p.gather(2, rows.targets.clamp(min=0)[..., None])[..., 0]
    return losses.masked_fill(rows.targets == IGNORED, 0.0)


@torch.no_grad()
@pytest.mark.parametrize("case", ["mac", "mag", "mal", "lmm", "transformer"])
@pytest.mark.parametrize("length", [None, 7, WINDOW])
def test_pieces_give_the_losses_of_whole_rows(case: str, length: int | None) -> None:
    model, rows = build_model(case), draw()
    carried, _ = losses_of(model, rows, length, None if case == "transformer" else WINDOW)
    torch.testing.assert_close(carried, whole_losses(model, rows), rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "overrides"),
    [
        ("lmm", {"memory": NO_TAILS}),
        ("mac", {"memory": NO_TAILS}),
        ("mag", {"window": 1, "memory": NO_TAILS}),
        ("mal", {"window": 1, "memory": NO_TAILS}),
    ],
)
@pytest.mark.parametrize("length", [5, 1000])
def test_a_reset_memory_reads_each_window_as_a_row_by_itself(case: str, overrides: dict, length: int) -> None:
    """In models where nothing but the memory looks back over a window's edge."""
    model, rows = build_model(case, **overrides), draw()
    carried, reset = losses_of(model, rows, length, WINDOW)
    for start in range(0, LENGTH, WINDOW):
        window = Rows(rows.tokens[:, start : start + WINDOW], rows.targets[:, start : start + WINDOW])
        alone = whole_losses(model, window)
        torch.testing.assert_close(reset[:, start : start + WINDOW], alone, rtol=1e-9, atol=1e-10)
        same = torch.allclose(carried[:, start : start + WINDOW], alone, rtol=1e-3)
        assert same == (start == 0), "without the memory of the windows before, something must differ"


@torch.no_grad()
@pytest.mark.parametrize("case", ["mag", "mal"])
def test_attention_goes_on_where_the_memory_is_reset(case: str) -> None:
    """One layer of it: without its memory's part it sees the window before as if nothing had been reset."""
    model, rows = build_model(case, num_layers=1), draw()
    states: list[tuple[ModelState, bool]] = []

    def read(rows: Rows, state: ModelState | None, more: bool):
        losses, after = model.token_losses(rows.tokens, rows.targets, state)
        states.append((after, state is not None and state.restart is not None))
        return losses, after

    list(read_in_pieces(rows, read, length=WINDOW, reset_window=WINDOW))
    carried, (reset, was_reset) = states[1][0], states[2]
    assert was_reset and not states[1][1]
    assert torch.equal(reset.position, carried.position)
    assert all(map(torch.equal, reset.layers[0].memory.tails, carried.layers[0].memory.tails))
    same_keys = torch.equal(reset.layers[0].attention.k, carried.layers[0].attention.k)
    assert same_keys == (case == "mag"), "the mal's attention reads what the memory gave"
    weights = zip(reset.layers[0].memory.memory.weights, carried.layers[0].memory.memory.weights, strict=True)
    assert not any(torch.allclose(ours, others) for ours, others in weights)


@torch.no_grad()
def test_nothing_is_read_twice_or_for_nothing() -> None:
    """The first window is the same in both readings; what lies behind the last target that counts is not read."""
    model, rows = build_model("lmm"), draw(rows=3)
    rows.targets[:, 2 * WINDOW :] = IGNORED
    rows.targets[2] = IGNORED
    calls: list[tuple[int, int]] = []
    list(read_in_pieces(rows, read_with(model, calls), length=WINDOW, reset_window=WINDOW))
    assert calls == [(2, WINDOW)] * 3
    assert not list(read_in_pieces(Rows(rows.tokens[2:], rows.targets[2:]), read_with(model), length=4))


def test_a_window_beside_the_pieces_cuts_them() -> None:
    model, rows = build_model("lmm"), draw()
    starts = [p.start for p in read_in_pieces(rows, read_with(model), length=10, reset_window=WINDOW)]
    assert starts == [0, 10, 16, 26, 32, 42, 48]


def test_sums_by_position_are_those_of_each_target() -> None:
    generator = torch.Generator().manual_seed(0)
    length = 2**21
    first = length - 300
    targets = torch.randint(0, 5, (2, 600), generator=generator)
    targets[:, ::7] = IGNORED
    losses = [torch.rand(2, 600, generator=generator) for _ in range(2)]
    sums = PositionSums(torch.device("cpu"), with_reset=True)
    for start, stop in ((0, 250), (250, 251), (251, 600)):  # the beginning of rows
        sums.add(start, targets[:, start:stop], *(x[:, start:stop] for x in losses))
    sums.add(first, targets, *losses)  # and around 2^21
    expected: dict[int, Counter[str]] = {}
    for row in range(2):
        for column in range(600):
            if targets[row, column] != IGNORED:
                for position in (column, first + column):
                    bucket = max(position // 64, 0).bit_length()
                    values = {"tokens": 1, "a": losses[0][row, column].item(), "b": losses[1][row, column].item()}
                    expected.setdefault(bucket, Counter()).update(values)
    found = sums.losses()
    assert [(b.first, b.last) for b in found] == [
        (0, 63), (64, 127), (128, 255), (256, 511), (512, 1023), (2**20, 2**21 - 1), (2**21, 2**22 - 1),
    ]  # fmt: skip
    for bucket, (_, by_hand) in zip(found, sorted(expected.items()), strict=True):
        assert bucket.tokens == by_hand["tokens"]
        assert bucket.loss == pytest.approx(by_hand["a"] / by_hand["tokens"], rel=1e-12)
        assert bucket.loss_reset == pytest.approx(by_hand["b"] / by_hand["tokens"], rel=1e-12)
    total = sum(by_hand["b"] for by_hand in expected.values())
    tokens = sum(by_hand["tokens"] for by_hand in expected.values())
    assert mean_reset(found) == pytest.approx(total / tokens, rel=1e-12)
    assert mean_reset([PositionLoss(0, 63, 4, 1.0)]) is None


def test_a_loss_that_is_not_finite_stays_in_its_bucket() -> None:
    sums = PositionSums(torch.device("cpu"), with_reset=False)
    losses = torch.ones(1, 130)
    losses[0, 65], losses[0, 129] = math.nan, math.nan
    targets = torch.zeros(1, 130, dtype=torch.int64)
    targets[0, 129] = IGNORED
    sums.add(0, targets, losses)
    assert [bucket.loss for bucket in sums.losses()] == [1.0, pytest.approx(math.nan, nan_ok=True), 1.0]


@pytest.mark.parametrize(
    ("preset", "window", "context", "message"),
    [
        ("transformer-tiny", 64, 1024, "a transformer has no memory: there is nothing to reset"),
        ("lmm-tiny", 100, 1024, r"--reset 100 is not a multiple of the model's chunk of \d+ tokens: \d+ or \d+ would"),
        ("mac-tiny", 1, 1024, r"--reset 1 is not a multiple of the model's segment of (\d+) tokens: \1 would be"),
        ("mag-tiny", 1024, 1024, "resets nothing in rows of 1024 tokens"),
    ],
)
def test_a_window_that_cannot_be_is_refused(preset: str, window: int, context: int, message: str) -> None:
    assert preset in PRESETS
    with pytest.raises(ValueError, match=message):
        require_reset_window(ModelConfig.preset(preset), window, context, "--reset")


def test_a_window_fits_from_a_row_on_that_is_a_token_longer() -> None:
    model = ModelConfig.preset("mac-tiny", segment=128)
    with pytest.raises(ValueError, match="resets nothing in rows of 256 tokens"):
        require_reset_window(model, 256, 256, "--reset")
    assert require_reset_window(model, 256, 257, "--reset") is None
