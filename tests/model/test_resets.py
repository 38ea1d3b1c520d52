"""Documents that begin inside a row: logits, gradients and state are those of each document run by itself."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model import ModelState, TitansLM
from model.resets import BEFORE, find_resets
from tests.model_cases import CASES

LENGTH = 40
LENGTHS = ((16, 8, 16), (24, 16), (40,), (8, 8, 24))
"""Of each row's documents, in tokens where the grid is 8 or a divisor of it."""


def rows_of_documents(model: TitansLM, *, first_row_goes_on: bool = False) -> Tensor:
    """Resets [B, LENGTH] of the lengths above; a transformer's documents begin anywhere, so they are moved by one."""
    resets = torch.zeros(len(LENGTHS), LENGTH, dtype=torch.bool)
    for row, lengths in enumerate(LENGTHS):
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        starts[1:] += model.config.grid == 1
        resets[row, starts] = True
    resets[0, 0] = not first_row_goes_on
    return resets


def documents(resets: Tensor) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of every run of tokens without a reset inside."""
    for row, flags in enumerate(resets):
        edges = sorted({0, *flags.nonzero().flatten().tolist(), resets.shape[1]})
        yield from ((row, start, stop) for start, stop in zip(edges, edges[1:], strict=False))


def alone(
    model: TitansLM, tokens: Tensor, targets: Tensor, resets: Tensor, state: ModelState | None
) -> tuple[Tensor, Tensor]:
    """Logits and sum of losses, each document run by itself; row 0 goes on from `state` where it has no reset at 0."""
    logits, loss = [], torch.zeros((), dtype=torch.float64)
    for row, start, stop in documents(resets):
        before = state if start == 0 and not resets[row, 0] else None
        piece = slice(row, row + 1), slice(start, stop)
        output = model(tokens[piece], before)
        logits.append(output.logits[0])
        losses = torch.nn.functional.cross_entropy(output.logits[0], targets[piece][0], reduction="sum")
        loss = loss + losses
    return torch.cat(logits).view(*tokens.shape, -1), loss


def state_of_row(state: ModelState, row: int) -> ModelState:
    return ModelState.from_tensors({n: t[row : row + 1] if t.dim() else t for n, t in state.flat().items()})


def assert_close_gradients(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], names: list[str]) -> None:
    assert len(found) == len(expected) == len(names) > 0
    for name, got, wanted in zip(names, found, expected, strict=True):
        atol = 1e-9 * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("carried", [False, True], ids=["from the beginning", "behind a state"])
def test_documents_in_rows_are_documents_by_themselves(case, carried, small_model, draw_tokens) -> None:
    model = small_model(case)
    tokens, targets = draw_tokens(4, LENGTH), draw_tokens(4, LENGTH, seed=2)
    resets = rows_of_documents(model, first_row_goes_on=carried)
    state = model(draw_tokens(4, 16, seed=5)).state.detach() if carried else None
    expected, loss = alone(model, tokens, targets, resets, None if state is None else state_of_row(state, 0))
    torch.testing.assert_close(model(tokens, state, resets=resets).logits, expected, rtol=1e-9, atol=1e-9)
    parameters = dict(model.named_parameters())
    output = model(tokens, state, targets=targets, resets=resets)
    torch.testing.assert_close(output.loss_sum, loss, rtol=1e-10, atol=0)
    found, wanted = (torch.autograd.grad(scalar, list(parameters.values())) for scalar in (output.loss_sum, loss))
    assert_close_gradients(found, wanted, list(parameters))
    lengths = [(row, stop - start) for row, start, stop in documents(resets)]
    last = [next(length for row, length in reversed(lengths) if row == number) for number in range(4)]
    assert output.state.position.tolist() == last


def test_rows_go_on_behind_their_last_document(case, small_model, draw_tokens) -> None:
    """In pieces cut off the grid, down to single tokens, with the gradient through the state."""
    model = small_model(case)
    tokens, targets, resets = draw_tokens(4, LENGTH), draw_tokens(4, LENGTH, seed=2), rows_of_documents(model)
    parameters = dict(model.named_parameters())
    whole = model(tokens, targets=targets, resets=resets)
    expected = torch.autograd.grad(whole.loss_sum, list(parameters.values()))
    for cut in ([11, 13, 16], [8, 8, 24], [24, *[1] * 3, 13]):
        state, loss = None, torch.zeros((), dtype=torch.float64)
        for piece in zip(*(x.split(cut, 1) for x in (tokens, targets, resets)), strict=True):
            output = model(piece[0], state, targets=piece[1], resets=piece[2])
            state, loss = output.state, loss + output.loss_sum
        torch.testing.assert_close(loss, whole.loss_sum, rtol=1e-10, atol=0)
        assert_close_gradients(torch.autograd.grad(loss, list(parameters.values())), expected, list(parameters))
        for path, tensor in whole.state.flat().items():
            torch.testing.assert_close(state.flat()[path], tensor, rtol=1e-9, atol=1e-9)


def test_no_gradient_crosses_a_reset(case, small_model, draw_tokens) -> None:
    """Nor does what is not finite: the state after a reset forgets all that was before."""
    model, tokens, targets = small_model(case), draw_tokens(2, 16), draw_tokens(2, 16, seed=2)
    before = model(draw_tokens(2, 16, seed=5)).state
    leaves = before.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
    resets = torch.zeros(2, 16, dtype=torch.bool)
    resets[1, 8] = True
    targets[1, :8] = -100
    output = model(tokens, leaves, targets=targets, resets=resets)
    floats = {path: leaf for path, leaf in leaves.named_tensors() if leaf.requires_grad and leaf.numel()}
    after = [tensor for _, tensor in output.state.named_tensors() if tensor.requires_grad]
    total = output.loss_sum + sum((tensor[1].square()).sum() for tensor in after)
    slopes = torch.autograd.grad(total, list(floats.values()), allow_unused=True)
    reached = [slope for slope in slopes if slope is not None]
    assert reached and not any(slope[1].any() for slope in reached)
    assert any(slope[0].any() for slope in reached)
    fresh = state_of_row(model(tokens[:, 8:]).state, 1)
    for path, tensor in state_of_row(output.state, 1).named_tensors():
        expected = dict(fresh.named_tensors())[path]
        if ".attention." not in path:  # its cache is longer, and hides what is before the document
            torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-9, msg=lambda text, path=path: path + text)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mag", "mal", "transformer-window"])
def test_what_is_hidden_is_cleared(name, small_model, draw_tokens) -> None:
    model = small_model(name)
    resets = torch.zeros(2, 16, dtype=torch.bool)
    resets[1, 12] = True
    cache = model(draw_tokens(2, 16), resets=resets).state.layers[0].attention
    window = model.config.window - 1
    assert cache.first_valid.tolist() == [0, window - 4]
    assert cache.k[0].any((1, 2)).all()
    assert cache.k[1].any((1, 2)).tolist() == [False] * (window - 4) + [True] * 4


@torch.no_grad()
def test_no_reset_changes_no_bit(case, small_model, draw_tokens) -> None:
    model, tokens = small_model(case, torch.float32), draw_tokens(2, 21)
    state = model(draw_tokens(2, 11, seed=5)).state
    none = torch.zeros(2, 21, dtype=torch.bool)
    assert torch.equal(model(tokens, state, resets=none).logits, model(tokens, state).logits)
    # And a row is not disturbed by a reset of another.
    none[1, 8 - 11 % 8] = True
    torch.testing.assert_close(
        model(tokens, state, resets=none).logits[0], model(tokens, state).logits[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("case", ["mac", "mag", "transformer-window"])
def test_recomputed_activations_give_the_same_gradients(case, small_model, draw_tokens) -> None:
    model, tokens, targets = small_model(case), draw_tokens(4, LENGTH), draw_tokens(4, LENGTH, seed=3)
    results = []
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        loss = model(tokens, targets=targets, resets=rows_of_documents(model)).loss_sum
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_each_module_is_called_as_often_whatever_the_resets(case, small_model, draw_tokens) -> None:
    """What ZeRO-3 needs where every rank has documents of its own: calls gather parameters, and all ranks must."""
    model, tokens = small_model(case), draw_tokens(4, LENGTH)
    calls: list[str] = []
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    seen = []
    for resets in (None, rows_of_documents(model), torch.zeros(4, LENGTH, dtype=torch.bool)):
        calls.clear()
        model(tokens, resets=resets)
        seen.append(list(calls))
    assert seen[0] == seen[1] == seen[2] != []


@pytest.mark.parametrize("carried", [False, True], ids=["from the beginning", "behind a state"])
def test_gradients_arrive_in_one_order_whatever_the_resets(case, carried, small_model, draw_tokens) -> None:
    """What ZeRO-2 needs: it sums over ranks what arrived at the same time."""
    model, tokens, targets = small_model(case), draw_tokens(4, LENGTH), draw_tokens(4, LENGTH, seed=2)
    state = model(draw_tokens(4, 16, seed=5)).state.detach() if carried else None
    arrived: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    none = torch.zeros(4, LENGTH, dtype=torch.bool)
    first = none.clone()
    first[2, 0] = True
    seen = []
    for resets in (None, none, first, rows_of_documents(model), rows_of_documents(model, first_row_goes_on=True)):
        arrived.clear()
        model(tokens, state, targets=targets, resets=resets).loss_sum.backward()
        seen.append(list(arrived))
    assert sorted(seen[0]) == sorted(dict(model.named_parameters()))
    assert seen.count(seen[0]) == len(seen)


@torch.no_grad()
def test_statistics_are_of_all_documents(small_model, draw_tokens) -> None:
    model, tokens = small_model("lmm"), draw_tokens(1, 24)
    resets = torch.zeros(1, 24, dtype=torch.bool)
    resets[0, 8] = True
    whole = model(tokens, resets=resets, with_stats=True).stats[1]
    first, second = (model(piece, with_stats=True).stats[1] for piece in tokens.split([8, 16], 1))
    for name in ("alpha", "surprise"):
        torch.testing.assert_close(whole[name], (8 * first[name] + 16 * second[name]) / 24)
    torch.testing.assert_close(whole["weight_norm"], second["weight_norm"])


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("lmm", 6, "begin at token 6, 2 tokens into a memory.chunk of 4"),
        ("mag", 8, "begin at token 8, 3 tokens into a memory.chunk of 4"),
        ("mac", 4, "begin at token 4, 4 tokens into a segment of 8"),
    ],
)
def test_a_document_inside_a_chunk_is_refused(name, at, message, small_model, draw_tokens) -> None:
    model, resets = small_model(name), torch.zeros(2, 16, dtype=torch.bool)
    state = model(draw_tokens(2, 11)).state if name == "mag" else None
    resets[1, at] = True
    with pytest.raises(ValueError, match=message):
        model(draw_tokens(2, 16), state, resets=resets)


def test_resets_have_the_shape_of_tokens(small_model, draw_tokens) -> None:
    for wrong in (torch.zeros(2, 15, dtype=torch.bool), torch.zeros(2, 16)):
        with pytest.raises(ValueError, match="resets are"):
            small_model("lmm")(draw_tokens(2, 16), resets=wrong)


@torch.no_grad()
def test_a_row_reset_by_hand_may_have_resets_behind(small_model, draw_tokens) -> None:
    model, tokens = small_model("lmm"), draw_tokens(2, 16)
    state = model(draw_tokens(2, 8, seed=5)).state
    by_hand = state.reset_rows(torch.tensor([True, False]))
    resets = torch.zeros(2, 16, dtype=torch.bool)
    resets[1, 4] = True
    both = resets.clone()
    both[0, 0] = True
    expected = model(tokens, state, resets=both).logits
    torch.testing.assert_close(model(tokens, by_hand, resets=resets).logits, expected, rtol=1e-9, atol=1e-9)


def test_pieces_of_resets_are_as_calls_on_them_alone() -> None:
    resets = torch.zeros(2, 12, dtype=torch.bool)
    resets[0, 4], resets[1, [0, 8]] = True, True
    found = find_resets(resets, None, torch.device("cpu"))
    assert list(found.rows) == [0, 4, 8]
    assert found.begins.tolist() == [[BEFORE] * 4 + [4] * 8, [0] * 8 + [8] * 4]
    piece, again = found.piece(4, 12), find_resets(resets[:, 4:], None, torch.device("cpu"))
    assert {index: rows.tolist() for index, rows in piece.rows.items()} == {0: [True, False], 4: [False, True]}
    assert torch.equal(piece.begins, again.begins)
    assert found.piece(5, 8) is None


def test_the_grid_is_that_of_the_variant(small_model) -> None:
    assert {case: small_model(case).config.grid for case in CASES} == {
        **dict.fromkeys(CASES, 4),
        "mac": 8,
        "mac-paper": 4,
        "transformer": 1,
        "transformer-window": 1,
    }
