"""The state as a value: saved and restored, moved, of constant size, with rows reset one by one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import ModelState

BOUNDARY = 16
"""A whole number of every small model's chunks and segments."""


@torch.no_grad()
@pytest.mark.parametrize("seen", [BOUNDARY, 11])
def test_a_state_saved_to_a_file_goes_on_bitwise(case, seen, small_model, draw_tokens, tmp_path) -> None:
    model, tokens = small_model(case, torch.float32), draw_tokens(2, 25)
    state = model(tokens[:, :seen]).state.reset_rows(torch.tensor([False, True]))
    save_file(state.tensors(), tmp_path / "state.safetensors")
    restored = ModelState.from_tensors(load_file(tmp_path / "state.safetensors"))
    expected, got = model(tokens[:, seen:], state), model(tokens[:, seen:], restored)
    assert torch.equal(got.logits, expected.logits)
    assert got.state.tensors().keys() == expected.state.tensors().keys()
    assert all(torch.equal(tensor, expected.state.tensors()[path]) for path, tensor in got.state.tensors().items())


def test_damaged_state_tensors_are_named(small_model, draw_tokens) -> None:
    tensors = small_model("mac")(draw_tokens(1, 5)).state.tensors()
    with pytest.raises(ValueError, match="alpha"):
        ModelState.from_tensors({name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")})
    with pytest.raises(ValueError, match="layers.7.other"):
        ModelState.from_tensors({**tensors, "layers.7.other": torch.zeros(1)})


@torch.no_grad()
def test_the_size_does_not_grow_with_the_tokens_seen(case, small_model, draw_tokens) -> None:
    model = small_model(case, torch.float32)
    sizes = []
    for length in (BOUNDARY + 7, 5 * BOUNDARY + 7):
        state = model(draw_tokens(2, length)).state
        sizes.append(sum(tensor.numel() for tensor in state.tensors().values()))
        for layer in state.layers:
            cache = layer.attention
            if cache is not None and case != "transformer":
                assert cache.k.untyped_storage().nbytes() == cache.k.numel() * 4, "the cache keeps the piece alive"
    assert (sizes[0] == sizes[1]) == (case != "transformer")


@torch.no_grad()
def test_a_row_reset_at_a_boundary_goes_on_as_a_new_sequence(case, small_model, draw_tokens) -> None:
    model = small_model(case, torch.float32)
    before, after = draw_tokens(3, BOUNDARY), draw_tokens(3, 19, seed=7)
    state = model(before).state
    plain = model(after, state)
    reset = model(after, state.reset_rows(torch.tensor([False, True, False])))
    fresh = model(after[1:2])
    torch.testing.assert_close(reset.logits[1], fresh.logits[0], rtol=1e-5, atol=1e-5)
    for row in (0, 2):
        assert torch.equal(reset.logits[row], plain.logits[row])
    assert reset.state.position.tolist() == [BOUNDARY + 19, 19, BOUNDARY + 19]
    # And in pieces behind the reset, a token at a time.
    pieces, running = [], state.reset_rows(torch.tensor([False, True, False]))
    for token in after.split(1, 1):
        output = model(token, running)
        running = output.state
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), reset.logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_row_reset_anywhere_forgets_everything_even_what_is_not_finite(case, small_model, draw_tokens) -> None:
    model, after = small_model(case, torch.float32), draw_tokens(2, 19, seed=7)
    rows = torch.tensor([True, False])
    state = model(draw_tokens(2, 13)).state
    reset = model(after, state.reset_rows(rows))
    other = draw_tokens(2, 13, seed=9)
    other[1] = draw_tokens(2, 13)[1]
    elsewhere = model(after, model(other).state.reset_rows(rows))
    assert torch.equal(elsewhere.logits[0], reset.logits[0])

    def poison(path: str, tensor: torch.Tensor) -> torch.Tensor:
        # A broken row of every carried tensor; positions are integers.
        if tensor.is_floating_point() and tensor.numel():
            tensor[0] = float("nan")
        return tensor

    broken = ModelState.from_tensors({path: poison(path, tensor) for path, tensor in state.tensors().items()})
    assert not model(after, broken).logits[0].isfinite().all()
    healed = model(after, broken.reset_rows(rows))
    assert torch.equal(healed.logits[0], reset.logits[0])
    torch.testing.assert_close(healed.logits[1], reset.logits[1], rtol=1e-6, atol=1e-6)


def test_gradients_reach_w0_through_a_reset_row(small_model, draw_tokens) -> None:
    model = small_model("mac")
    state = model(draw_tokens(2, BOUNDARY)).state.detach().reset_rows(torch.tensor([True, True]))
    tokens, targets = draw_tokens(2, 6), draw_tokens(2, 6, seed=2)
    parameters = list(model.parameters())
    reset = torch.autograd.grad(model(tokens, state, targets=targets).loss_sum, parameters)
    fresh = torch.autograd.grad(model(tokens, targets=targets).loss_sum, parameters)
    for got, expected in zip(reset, fresh, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_detach_cuts_the_graph_and_clone_shares_nothing(small_model, draw_tokens) -> None:
    state = small_model("mag")(draw_tokens(2, 9)).state
    carried = state.layers[0].memory.memory.weights[0]
    assert carried.requires_grad
    assert not state.detach().layers[0].memory.memory.weights[0].requires_grad
    copied = state.clone().layers[0].memory.memory.weights[0]
    assert copied.requires_grad and copied.data_ptr() != carried.data_ptr()
    assert state.to("meta").position.device.type == "meta"


def test_gradients_can_be_handed_over_at_a_cut_state(case, small_model, draw_tokens) -> None:
    """What training by segments does: a leaf copy of the state in between, its gradient fed to the piece before."""
    model, tokens, targets = small_model(case), draw_tokens(2, 20), draw_tokens(2, 20, seed=2)
    parameters = list(model.parameters())
    first = model(tokens[:, :11], targets=targets[:, :11])
    leaves = first.state.map(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()))
    second = model(tokens[:, 11:], leaves, targets=targets[:, 11:])
    second.loss_sum.backward()
    carried = {path: leaf.grad for path, leaf in leaves.named_tensors() if leaf.grad is not None}
    # A momentum that is always zero has no graph to feed.
    fed = [(tensor, carried[path]) for path, tensor in first.state.named_tensors() if path in carried]
    outgoing, slopes = zip(*((tensor, slope) for tensor, slope in fed if tensor.requires_grad), strict=True)
    torch.autograd.backward([first.loss_sum, *outgoing], [None, *slopes])
    by_hand = [parameter.grad for parameter in parameters]
    whole = torch.autograd.grad(model(tokens, targets=targets).loss_sum, parameters)
    for got, expected in zip(by_hand, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_reset_rows_takes_one_flag_a_row(small_model, draw_tokens) -> None:
    state = small_model("lmm")(draw_tokens(2, 4)).state
    for wrong in (torch.ones(3, dtype=torch.bool), torch.ones(2)):
        with pytest.raises(ValueError, match="rows is"):
            state.reset_rows(wrong)


@torch.no_grad()
def test_a_fresh_initial_state_is_no_state(case, small_model, draw_tokens) -> None:
    model, tokens = small_model(case), draw_tokens(2, 9)
    expected = model(tokens).logits
    assert torch.equal(model(tokens, model.initial_state(2)).logits, expected)
    restored = ModelState.from_tensors(model.initial_state(2).reset_rows(torch.tensor([True, False])).tensors())
    assert torch.equal(model(tokens, restored).logits, expected)


@torch.no_grad()
def test_rows_of_a_state_go_on_as_rows_of_another_batch(case, small_model, draw_tokens) -> None:
    model, tokens, rest = small_model(case), draw_tokens(3, 11), draw_tokens(4, 6, seed=1)
    rows = torch.tensor([2, 0, 2, 1])
    state = model(tokens).state.reset_rows(torch.tensor([False, True, False]))
    selected = model(rest, state.select_rows(rows)).logits
    for place, row in enumerate(rows):
        alone = model(rest[place : place + 1], state.select_rows(row[None])).logits
        torch.testing.assert_close(selected[place], alone[0], rtol=1e-12, atol=1e-12)
    every = model(rest[[1, 3, 0]], state).logits
    torch.testing.assert_close(every, selected[[1, 3, 0]], rtol=1e-12, atol=1e-12)
