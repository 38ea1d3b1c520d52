"""What users of the neural memory rely on: causal, rows apart, cut anywhere, nothing changed in place, clear errors."""

from __future__ import annotations

import pytest
import torch

from kernels.memory import MemoryState, memory_read, neural_memory, neural_memory_reference
from tests.kernels.memory_cases import leaves, make_inputs, make_weights, relative_error

OPTIONS = {"chunk_size": 4, "step_bound": 2.0}


@pytest.mark.parametrize("changed", [0, 3, 4, 9])
def test_a_token_changes_nothing_before_it(changed: int) -> None:
    weights = make_weights(2)
    inputs = make_inputs(11)
    y, _ = neural_memory(*inputs, weights, **OPTIONS)
    others = make_inputs(11, seed=99)
    here = torch.arange(11) == changed
    mixed = [torch.where(here.view(-1, *(1,) * (x.dim() - 2)), o, x) for x, o in zip(inputs, others, strict=True)]
    z, _ = neural_memory(*mixed, weights, **OPTIONS)
    assert torch.equal(y[:, :changed], z[:, :changed])
    assert not torch.allclose(y[:, changed:], z[:, changed:])
    keys_only = [inputs[0], *mixed[1:]]
    assert not torch.allclose(y[:, changed], neural_memory(*keys_only, weights, **OPTIONS)[0][:, changed])


def test_rows_are_apart() -> None:
    weights, inputs = make_weights(2), make_inputs(11, rows=3)
    y, state = neural_memory(*inputs, weights, **OPTIONS)
    alone, alone_state = neural_memory(*[x[1:2] for x in inputs], weights, **OPTIONS)
    assert relative_error(y[1:2], alone) < 1e-14
    assert relative_error(state.weights[0][1:2], alone_state.weights[0]) < 1e-14


@pytest.mark.parametrize("pieces", [[1] * 19, [3, 5, 11], [4, 8, 7], [18, 1], [2, 17]])
def test_any_split_gives_the_whole_with_its_gradients(pieces: list[int]) -> None:
    inputs, weights = leaves(make_inputs(19)), leaves(make_weights(2))
    y, end = neural_memory(*inputs, weights, **OPTIONS)
    state, outputs = None, []
    for piece in zip(*(x.split(pieces, dim=1) for x in inputs), strict=True):
        out, state = neural_memory(*piece, weights, state, **OPTIONS)
        outputs.append(out)
    assert relative_error(torch.cat(outputs, 1), y) < 1e-13
    assert state.num_open == end.num_open == 3
    projection = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    whole = torch.autograd.grad((y * projection).sum() + end.weights[0].sum(), [*inputs, *weights])
    cut = torch.autograd.grad((torch.cat(outputs, 1) * projection).sum() + state.weights[0].sum(), [*inputs, *weights])
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(cut, whole, strict=True))


def test_equal_calls_give_equal_results_and_change_no_input() -> None:
    inputs, weights = make_inputs(7), make_weights(2)
    state = neural_memory(*make_inputs(6, seed=2), weights, **OPTIONS)[1]
    before = [x.clone() for x in (*inputs, *weights, *state.weights, *state.momentum, state.k)]
    first, _ = neural_memory(*inputs, weights, state, **OPTIONS)
    second, _ = neural_memory(*inputs, weights, state, **OPTIONS)
    assert torch.equal(first, second)
    after = [*inputs, *weights, *state.weights, *state.momentum, state.k]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_chunk_of_one_token_is_plain_online_learning() -> None:
    """With chunks of one token, no momentum and no forgetting, a linear memory is the delta rule."""
    (q, k, v, alpha, eta, theta), (w,) = make_inputs(5, rows=1), make_weights(1)
    y, _ = neural_memory(q, k, v, 0 * alpha, 0 * eta, theta, [w], chunk_size=1)
    for head in range(q.shape[2]):
        m = w[head].clone()
        for t in range(5):
            error = k[0, t, head] @ m - v[0, t, head]
            m = m - 2 * theta[0, t, head] * torch.outer(k[0, t, head], error)
            torch.testing.assert_close(y[0, t, head], q[0, t, head] @ m)


def test_bf16_inputs_keep_an_fp32_state() -> None:
    inputs, weights = make_inputs(11, dtype=torch.float32), make_weights(2, dtype=torch.float32)
    y, _ = neural_memory(*inputs, weights, **OPTIONS)
    low, state = neural_memory(*[x.bfloat16() for x in inputs], [w.bfloat16() for w in weights], **OPTIONS)
    assert low.dtype == torch.bfloat16
    assert state.weights[0].dtype == state.momentum[1].dtype == torch.float32
    assert relative_error(low.float(), y) < 0.05


def test_bf16_gradients_arrive_in_the_inputs_dtype() -> None:
    inputs = leaves([x.bfloat16() for x in make_inputs(9, dtype=torch.float32)])
    weights = leaves([w.bfloat16() for w in make_weights(2, dtype=torch.float32)])
    neural_memory(*inputs, weights, **OPTIONS)[0].sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in (*inputs, *weights))


def test_autocast_changes_no_product_of_the_memory() -> None:
    inputs, weights = make_inputs(11, dtype=torch.float32), make_weights(2, dtype=torch.float32)

    def results(in_bf16: bool) -> list[torch.Tensor]:
        own = leaves(inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            y, state = neural_memory(*own, weights, **OPTIONS)
            read = memory_read(inputs[0], weights)
            gradients = torch.autograd.grad(y.square().sum(), own)
        return [y, read, *state.weights, *state.momentum, *gradients]

    for got, wanted in zip(results(True), results(False), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, wanted)


def test_reset_rows_start_anew_and_others_go_on() -> None:
    weights = make_weights(2)
    state = neural_memory(*make_inputs(8, rows=2, seed=4), weights, **OPTIONS)[1]
    reset = state.reset_rows(torch.tensor([True, False]), weights)
    inputs = make_inputs(7)
    y, _ = neural_memory(*inputs, weights, reset, **OPTIONS)
    fresh, _ = neural_memory(*inputs, weights, **OPTIONS)
    going_on, _ = neural_memory(*inputs, weights, state, **OPTIONS)
    assert torch.equal(y[0], fresh[0])
    assert torch.equal(y[1], going_on[1])


def test_a_row_reset_inside_a_chunk_forgets_its_open_tokens() -> None:
    weights = make_weights(2)
    state = neural_memory(*make_inputs(6, seed=4), weights, **OPTIONS)[1]
    reset = state.reset_rows(torch.tensor([True, False]), weights)
    other = neural_memory(*make_inputs(6, seed=5), weights, **OPTIONS)[1]
    other = other.reset_rows(torch.tensor([True, False]), weights)
    inputs = make_inputs(7)
    y, z = (neural_memory(*inputs, weights, s, **OPTIONS)[0] for s in (reset, other))
    assert torch.equal(y[0], z[0])
    assert not torch.allclose(y[1], z[1])
    # The first two tokens after the reset share the old grid's chunk: they read what a new sequence reads.
    fresh, _ = neural_memory(*inputs, weights, **OPTIONS)
    assert relative_error(y[0, :2], fresh[0, :2]) < 1e-14


def test_memory_read_is_the_network_and_reads_a_state() -> None:
    q, weights = make_inputs(6)[0], make_weights(3)
    state = MemoryState.initial(weights, 2)
    by_rows = memory_read(q, state.weights, activation="gelu", activation_scale=0.5)
    shared = memory_read(q, weights, activation="gelu", activation_scale=0.5)
    torch.testing.assert_close(by_rows, shared)
    zero = torch.zeros(2, 6, 2, dtype=q.dtype)
    still, _ = neural_memory(q, q, q, zero, zero, zero, weights, chunk_size=4, activation="gelu", activation_scale=0.5)
    torch.testing.assert_close(still, shared)


def test_the_reference_is_a_backend() -> None:
    inputs, weights = make_inputs(5), make_weights(2)
    y, _ = neural_memory(*inputs, weights, backend="reference", **OPTIONS)
    assert torch.equal(y, neural_memory_reference(*inputs, weights, **OPTIONS)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"activation": "tanh"}, "activation is 'tanh'.*silu, gelu, softmax"),
        ({"forget_to": "nothing"}, "forget_to"),
        ({"objective": "l1"}, "objective"),
        ({"step_bound": -1.0}, "step_bound"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"weights": []}, "weights has 0 layers"),
        ({"weights": [torch.zeros(2, 4, 3)]}, r"weights\[0\] has d_out 3"),
        ({"weights": [torch.zeros(3, 4, 4)]}, r"weights\[0\] is \[3, 4, 4\]"),
        ({"alpha": torch.zeros(2, 5)}, r"alpha is \[2, 5\]"),
        ({"v": torch.zeros(2, 5, 2, 3)}, r"v is \[2, 5, 2, 3\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    names = ("q", "k", "v", "alpha", "eta", "theta")
    arguments = dict(zip(names, make_inputs(5), strict=True), weights=make_weights(1), chunk_size=4) | change
    with pytest.raises(ValueError, match=message):
        neural_memory(**arguments)


def test_a_state_of_another_model_is_refused() -> None:
    inputs = make_inputs(5)
    state = neural_memory(*inputs, make_weights(2), chunk_size=8)[1]
    with pytest.raises(ValueError, match=r"state\.weights.*another batch or model"):
        neural_memory(*inputs, make_weights(1), state, chunk_size=8)
    with pytest.raises(ValueError, match="another chunk size"):
        neural_memory(*inputs, make_weights(2), state, chunk_size=4)
