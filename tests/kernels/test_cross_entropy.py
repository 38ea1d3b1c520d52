"""The chunked head loss against torch's own, its gradients, and what it keeps in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from kernels.cross_entropy import VocabularyPart, linear_cross_entropy, token_losses, token_scores


def _problem(dtype: torch.dtype, tokens: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(13, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(13, (tokens,), generator=generator)
    targets[::3] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 1024])
def test_loss_and_gradients_equal_the_plain_ones(chunk_tokens: int) -> None:
    hidden, weight, targets = _problem(torch.float64)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk_tokens)
    plain = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
    got_all, expected_all = (torch.autograd.grad(value * 0.7, (hidden, weight)) for value in (loss, plain))
    for got, expected in zip(got_all, expected_all, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_gradcheck_passes() -> None:
    hidden, weight, targets = _problem(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens=4), (hidden, weight))


def test_only_the_gradients_asked_for_are_computed() -> None:
    hidden, weight, targets = _problem(torch.float64)
    frozen = linear_cross_entropy(hidden, weight.detach(), targets)
    full = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(torch.autograd.grad(frozen, hidden)[0], torch.autograd.grad(full, hidden)[0])


def test_without_gradients_only_the_logits_are_computed() -> None:
    hidden, weight, targets = _problem(torch.float32)
    counts = []
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled), FlopCounterMode(display=False) as counter:
            linear_cross_entropy(hidden, weight, targets)
        counts.append(counter.get_total_flops())
    assert counts == [2 * hidden.numel() * len(weight), 6 * hidden.numel() * len(weight)]


def test_bf16_sums_in_fp32() -> None:
    hidden, weight, targets = _problem(torch.bfloat16, tokens=300)
    loss = linear_cross_entropy(hidden, weight, targets)
    exact = linear_cross_entropy(hidden.double(), weight.double(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=2e-3, atol=0)
    grad, expected = (torch.autograd.grad(value, weight)[0] for value in (loss, exact))
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, expected, rtol=0.05, atol=0.2)


def test_no_counted_token_gives_zero_loss_and_zero_gradient() -> None:
    hidden, weight, targets = _problem(torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any() and not weight.grad.any()


def test_token_losses_sum_to_the_loss_and_skip_ignored_tokens() -> None:
    hidden, weight, targets = _problem(torch.float64)
    losses = token_losses(hidden, weight, targets, chunk_tokens=4)
    assert not losses.requires_grad and losses.shape == targets.shape
    assert not losses[targets == -100].any()
    torch.testing.assert_close(losses.sum(), linear_cross_entropy(hidden, weight, targets))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1024])
def test_token_scores_are_the_losses_and_where_the_target_has_the_largest_logit(chunk_tokens: int) -> None:
    hidden, weight, targets = _problem(torch.float64, tokens=60)
    best = (hidden @ weight.T).argmax(1)
    targets[1::6] = best[1::6]
    losses, correct = token_scores(hidden, weight, targets, chunk_tokens=chunk_tokens)
    assert torch.equal(losses, token_losses(hidden, weight, targets, chunk_tokens=chunk_tokens))
    assert torch.equal(correct, best == targets) and correct.any() and not correct.all()
    assert not losses.requires_grad and correct.dtype == torch.bool


def test_equal_logits_are_right_for_one_target_only() -> None:
    targets = torch.arange(5)
    _, correct = token_scores(torch.zeros(5, 3), torch.zeros(5, 3), targets)
    assert correct.sum() == 1


def test_an_ignored_token_is_never_right() -> None:
    """Not even where the index that is ignored is a token, and the one that the logits are for."""
    _, correct = token_scores(torch.eye(3), torch.eye(3), torch.arange(3), ignore_index=1)
    assert correct.tolist() == [True, False, True]


def test_another_ignore_index_is_honoured() -> None:
    hidden, weight, targets = _problem(torch.float64)
    moved = targets.masked_fill(targets == -100, 5)
    expected = cross_entropy(hidden @ weight.T, moved, ignore_index=5, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, moved, ignore_index=5), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden": torch.zeros(4, 5)}, "hidden"),
        ({"weight": torch.zeros(3, 6, dtype=torch.float64)}, "weight"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
    ],
)
def test_a_wrong_argument_is_named(change: dict, named: str) -> None:
    arguments = {"hidden": torch.zeros(4, 6), "weight": torch.zeros(3, 6), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=named):
        linear_cross_entropy(**{**arguments, **change})


class _Parts:
    """A weight held in parts of these lengths, each by a thread; `of` gives the part of one."""

    def __init__(self, *lengths: int) -> None:
        self.edges = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
        self._barrier = Barrier(len(lengths))
        self._given = [torch.empty(0)] * len(lengths)

    def of(self, number: int) -> tuple[slice, VocabularyPart]:
        def joined(join: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def meet(own: Tensor) -> Tensor:
                self._given[number] = own
                self._barrier.wait(10)
                result = join(torch.stack(self._given))
                self._barrier.wait(10)
                return result

            return meet

        start, stop = self.edges[number : number + 2]
        return slice(start, stop), VocabularyPart(start, joined(lambda x: x.amax(0)), joined(lambda x: x.sum(0)))

    def run(self, function: Callable[[slice, VocabularyPart], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        count = len(self._given)
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda number: function(*self.of(number)), range(count)))


@pytest.mark.parametrize("chunk_tokens", [4, 1024])
def test_parts_of_the_vocabulary_give_the_loss_of_the_whole_and_their_parts_of_the_gradients(chunk_tokens: int) -> None:
    hidden, weight, targets = _problem(torch.float64)
    expected = linear_cross_entropy(hidden, weight, targets)
    expected_hidden, expected_weight = torch.autograd.grad(expected, (hidden, weight))

    def part(rows: slice, vocabulary: VocabularyPart) -> tuple[Tensor, ...]:
        own, held = (x.detach().clone().requires_grad_() for x in (hidden, weight[rows]))
        loss = linear_cross_entropy(own, held, targets, chunk_tokens=chunk_tokens, vocabulary=vocabulary)
        return loss.detach(), *torch.autograd.grad(loss, (own, held))

    losses, of_hidden, of_weight = zip(*_Parts(5, 1, 7).run(part), strict=True)
    for loss in losses:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.stack(of_hidden).sum(0), expected_hidden, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat(of_weight), expected_weight, rtol=1e-12, atol=1e-13)


def test_parts_of_the_vocabulary_give_the_scores_of_the_whole() -> None:
    hidden, weight, targets = _problem(torch.float64, tokens=300)
    losses, correct = token_scores(hidden, weight, targets)
    assert 0 < correct.sum() < (targets != -100).sum()
    for own_losses, own_correct in _Parts(5, 1, 7).run(
        lambda rows, vocabulary: token_scores(hidden, weight[rows], targets, vocabulary=vocabulary)
    ):
        torch.testing.assert_close(own_losses, losses, rtol=1e-12, atol=1e-13)
        assert torch.equal(own_correct, correct)


def test_of_equal_logits_in_several_parts_one_is_taken() -> None:
    hidden, targets = torch.zeros(13, 6), torch.arange(13)
    for _, correct in _Parts(5, 1, 7).run(
        lambda rows, vocabulary: token_scores(hidden, torch.ones(13, 6)[rows], targets, vocabulary=vocabulary)
    ):
        assert correct.sum() == 1
