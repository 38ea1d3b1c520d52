"""Sampling: greedy equals a whole pass, options narrow the choice, rows stop."""

import pytest
import torch

from model.generation import TokenStream, generate


@torch.no_grad()
def test_greedy_tokens_are_the_likeliest_of_a_whole_pass(case, small_model, draw_tokens) -> None:
    model, prompt = small_model(case), draw_tokens(2, 9)
    made = generate(model, prompt, max_new_tokens=12, temperature=0)
    logits = model(torch.cat((prompt, made), 1)).logits
    assert torch.equal(made, logits[:, 8:-1].argmax(-1))


def test_narrow_options_are_greedy(small_model, draw_tokens) -> None:
    model, prompt = small_model("mag"), draw_tokens(3, 5)
    greedy = generate(model, prompt, max_new_tokens=6, temperature=0)
    assert torch.equal(generate(model, prompt, max_new_tokens=6, top_k=1), greedy)
    assert torch.equal(generate(model, prompt, max_new_tokens=6, top_p=1e-6), greedy)
    assert torch.equal(generate(model, prompt, max_new_tokens=6, temperature=1e-4), greedy)


def test_a_generator_makes_samples_repeatable(small_model, draw_tokens) -> None:
    model, prompt = small_model("lmm"), draw_tokens(2, 5)
    first, second, other = (
        generate(model, prompt, max_new_tokens=20, temperature=3.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_samples_stay_among_the_allowed_tokens(small_model, draw_tokens) -> None:
    model, prompt = small_model("transformer"), draw_tokens(1, 5).expand(200, 5)
    probabilities = model(prompt[:1]).logits[0, -1].softmax(-1)
    by_k = generate(model, prompt, max_new_tokens=1, top_k=3)
    assert set(by_k[:, 0].tolist()) <= set(probabilities.topk(3).indices.tolist())
    ordered, order = probabilities.sort(descending=True)
    enough = int((ordered.cumsum(0) < 0.5).sum()) + 1
    by_p = generate(model, prompt, max_new_tokens=1, top_p=0.5)
    assert set(by_p[:, 0].tolist()) == set(order[:enough].tolist())


def test_a_row_ends_with_the_stop_token(small_model, draw_tokens) -> None:
    model, prompt = small_model("mac"), draw_tokens(2, 5)
    free = generate(model, prompt, max_new_tokens=10, temperature=0)
    stop = int(free[0, 3])
    made = generate(model, prompt, max_new_tokens=10, temperature=0, stop_token=stop)
    first = free[0].tolist().index(stop)
    assert (made[0, first:] == stop).all()
    assert torch.equal(made[0, : first + 1], free[0, : first + 1])
    alone = generate(model, prompt[:1], max_new_tokens=10, temperature=0, stop_token=stop)
    assert alone.shape[1] == first + 1


def test_a_prompt_can_continue_a_state(small_model, draw_tokens) -> None:
    model, prompt = small_model("mal"), draw_tokens(2, 9)
    state = model(prompt[:, :6]).state
    whole = generate(model, prompt, max_new_tokens=5, temperature=0)
    assert torch.equal(generate(model, prompt[:, 6:], max_new_tokens=5, temperature=0, state=state), whole)


@torch.no_grad()
def test_a_stream_has_the_state_of_all_but_the_last_token(case, small_model, draw_tokens) -> None:
    model, prompt = small_model(case), draw_tokens(2, 9)
    stream = TokenStream(model, prompt, max_new_tokens=5, temperature=0)
    first = [next(stream) for _ in range(3)]
    expected = model(torch.cat((prompt, torch.stack(first[:2], 1)), 1)).state.tensors()
    for name, tensor in stream.state.tensors().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9)
    state, unread = stream.state, first[-1][:, None]
    rest = TokenStream(model, unread, max_new_tokens=2, temperature=0, state=state)
    assert torch.equal(torch.stack(list(rest)), torch.stack(list(stream)))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_whose_logits_are_no_numbers_is_told_and_leaves_the_others(temperature, small_model, draw_tokens) -> None:
    model, prompt = small_model("lmm"), draw_tokens(3, 9)
    options = {"max_new_tokens": 4, "temperature": temperature}

    def state(rows: slice):
        with torch.no_grad():
            return model(prompt[rows]).state

    spoilt = state(slice(0, 3))
    spoilt.layers[0].memory.memory.weights[0][1] = torch.nan
    stream = TokenStream(model, prompt[:, :1], state=spoilt, generator=torch.Generator().manual_seed(0), **options)
    made = torch.stack(list(stream), 1)
    assert stream.finite.tolist() == [True, False, True]
    sound = TokenStream(
        model, prompt[:, :1], state=state(slice(0, 3)), generator=torch.Generator().manual_seed(0), **options
    )
    assert torch.equal(made[::2], torch.stack(list(sound), 1)[::2]) and bool(sound.finite.all())
    with pytest.raises(FloatingPointError, match=r"not finite in rows \[1\]"):
        generate(model, prompt[:, :1], state=spoilt, **options)


@torch.no_grad()
def test_what_a_row_reads_behind_its_stop_token_does_not_count(small_model, draw_tokens) -> None:
    model, prompt = small_model("lmm"), draw_tokens(2, 5)
    stop = int(generate(model, prompt[:1], max_new_tokens=1, temperature=0)[0, 0])
    stream = TokenStream(model, prompt, max_new_tokens=3, temperature=0, stop_token=stop)
    assert int(next(stream)[0]) == stop
    stream.state.layers[0].memory.memory.weights[0][0] = torch.nan
    list(stream)
    assert stream.finite.tolist() == [True, True]


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_options_out_of_range_are_named(wrong, small_model, draw_tokens) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate(small_model("lmm"), draw_tokens(1, 2), **{"max_new_tokens": 1, **wrong})
