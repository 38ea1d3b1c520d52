"""What must hold of every variant: causal, rows apart, cut anywhere, repeatable, exact gradients."""

import pytest
import torch
from torch import Tensor

from model import ModelState, TitansLM
from model.gates import GateProjection

LENGTH = 21


def _in_pieces(model: TitansLM, tokens: Tensor, lengths: list[int]) -> tuple[Tensor, ModelState]:
    state, logits = None, []
    for piece in tokens.split(lengths, 1):
        output = model(piece, state)
        state = output.state
        logits.append(output.logits)
    return torch.cat(logits, 1), state


@torch.no_grad()
def test_a_token_changes_no_logit_before_it(case, small_model, draw_tokens) -> None:
    model, tokens = small_model(case), draw_tokens(2, LENGTH)
    logits = model(tokens).logits
    for j in range(LENGTH):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % 31
        moved = (model(changed).logits - logits).abs().amax((0, 2))
        assert not (moved[:j] > 1e-13).any(), f"token {j} reached the past"
        assert moved[j] > 1e-6, f"token {j} does not reach its own logits"


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(case, small_model, draw_tokens) -> None:
    model, tokens = small_model(case), draw_tokens(3, LENGTH)
    logits = model(tokens).logits
    others = draw_tokens(3, LENGTH, seed=5)
    others[1] = tokens[1]
    torch.testing.assert_close(model(others).logits[1], logits[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(tokens[1:2]).logits[0], logits[1], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    "lengths",
    [[1] * LENGTH, [13, 8], [4, 4, 8, 5], [7, 1, 2, 11], [20, 1], [3, 18]],
    ids=["token by token", "two", "at boundaries", "odd", "last alone", "early"],
)
def test_any_split_gives_the_logits_of_the_whole(case, lengths, small_model, draw_tokens) -> None:
    model, tokens = small_model(case, torch.float32), draw_tokens(2, LENGTH)
    whole = model(tokens)
    logits, state = _in_pieces(model, tokens, lengths)
    torch.testing.assert_close(logits, whole.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.position, torch.full((2,), LENGTH))
    expected = whole.state.tensors()
    for path, tensor in state.tensors().items():
        torch.testing.assert_close(
            tensor, expected[path], rtol=1e-4, atol=1e-5, msg=lambda text, path=path: path + text
        )


def test_equal_calls_give_equal_results_and_change_nothing(case, small_model, draw_tokens) -> None:
    model, tokens = small_model(case, torch.float32), draw_tokens(2, LENGTH)
    state = model(tokens[:, :11]).state
    before = state.tensors()
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first, second = (model(tokens[:, 11:], state) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    for path, tensor in state.tensors().items():
        assert torch.equal(tensor, before[path]), path
    for path, tensor in first.state.tensors().items():
        assert torch.equal(tensor, second.state.tensors()[path]), path
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


def _loss(model: TitansLM, tokens: Tensor, targets: Tensor) -> Tensor:
    """Over two pieces, so that gradients also pass through the state."""
    first = model(tokens[:, :9], targets=targets[:, :9])
    return first.loss_sum + model(tokens[:, 9:], first.state, targets=targets[:, 9:]).loss_sum


def test_every_parameter_has_the_gradient_of_finite_differences(case, small_model, draw_tokens) -> None:
    model, tokens, targets = small_model(case), draw_tokens(2, 14), draw_tokens(2, 14, seed=3)
    targets[0, 4] = -100
    _loss(model, tokens, targets).backward()
    generator, step = torch.Generator().manual_seed(4), 1e-5
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        values = []
        with torch.no_grad():
            for shift in (step, -2 * step):
                parameter += shift * direction
                values.append(_loss(model, tokens, targets))
            parameter += step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert parameter.grad.abs().max() > 1e-8, f"{name} receives no gradient"
        torch.testing.assert_close(
            (parameter.grad * direction).sum(), slope, rtol=1e-5, atol=2e-7, msg=lambda text, name=name: name + text
        )


def test_a_split_has_the_gradients_of_the_whole(case, small_model, draw_tokens) -> None:
    model, tokens, targets = small_model(case), draw_tokens(2, 14), draw_tokens(2, 14, seed=3)
    parameters = list(model.parameters())
    split = torch.autograd.grad(_loss(model, tokens, targets), parameters)
    whole = torch.autograd.grad(model(tokens, targets=targets).loss_sum, parameters)
    for got, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_activation_checkpointing_changes_no_gradient(case, small_model, draw_tokens) -> None:
    model, tokens, targets = small_model(case), draw_tokens(2, 14), draw_tokens(2, 14, seed=3)
    results = []
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        loss = _loss(model, tokens, targets)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_loss_is_that_of_the_logits(case, small_model, draw_tokens) -> None:
    model, tokens, targets = small_model(case), draw_tokens(2, LENGTH), draw_tokens(2, LENGTH, seed=3)
    targets[1, 3:7] = -100
    expected = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    output = model(tokens, targets=targets)
    assert output.logits is None
    torch.testing.assert_close(output.loss_sum, expected)


@torch.no_grad()
def test_the_losses_of_single_tokens_sum_to_the_loss_in_any_split(case, small_model, draw_tokens) -> None:
    model, tokens, targets = small_model(case), draw_tokens(2, LENGTH), draw_tokens(2, LENGTH, seed=3)
    targets[1, 3:7] = -100
    first, state = model.token_losses(tokens[:, :6], targets[:, :6])
    second, _ = model.token_losses(tokens[:, 6:], targets[:, 6:], state)
    losses = torch.cat((first, second), 1)
    assert losses.shape == targets.shape and not losses[targets == -100].any()
    torch.testing.assert_close(losses.sum(), model(tokens, targets=targets).loss_sum)


@torch.no_grad()
def test_correct_targets_are_those_with_the_largest_logit(case, small_model, draw_tokens) -> None:
    model, tokens, targets = small_model(case), draw_tokens(2, LENGTH), draw_tokens(2, LENGTH, seed=3)
    best = model(tokens).logits.argmax(2)
    targets[0, ::2], targets[1, 3:7] = best[0, ::2], -100
    output = model(tokens, targets=targets, with_correct=True)
    assert torch.equal(output.correct, best == targets)
    torch.testing.assert_close(output.losses, model.token_losses(tokens, targets)[0])
    torch.testing.assert_close(output.loss_sum, model(tokens, targets=targets).loss_sum)
    with pytest.raises(ValueError, match="no targets"):
        model(tokens, with_correct=True)


@torch.no_grad()
def test_parameters_are_used_in_their_owners_forward_only(case, small_model, draw_tokens) -> None:
    """What ZeRO-3 needs: here each parameter is there during its module's forward and empty at any other time."""
    model, tokens = small_model(case), draw_tokens(2, LENGTH)
    expected = [model(tokens).logits, model(tokens, model(tokens).state.reset_rows(torch.tensor([True, False]))).logits]
    kept = {parameter: parameter.data for parameter in model.parameters()}

    def gather(module: torch.nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = kept[parameter]

    def release(module: torch.nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module)
    first = model(tokens)
    second = model(tokens, first.state.reset_rows(torch.tensor([True, False])))
    assert torch.equal(first.logits, expected[0])
    assert torch.equal(second.logits, expected[1])


@torch.no_grad()
@pytest.mark.parametrize("writes", ["residual", "attention"])
def test_the_macs_memory_is_taught_the_tokens_or_attentions_output_alone(writes, small_model, draw_tokens) -> None:
    model, tokens = small_model("mac", mac_writes=writes), draw_tokens(2, LENGTH)
    for block in model.blocks:
        block.mixer.attention.output.weight.zero_()  # attention says nothing: the memory alone looks past a segment
    changed = torch.cat(((tokens[:, :1] + 1) % 31, tokens[:, 1:]), 1)
    later = (model(tokens).logits[:, 9:] - model(changed).logits[:, 9:]).abs().amax()
    assert later > 1e-6 if writes == "residual" else later == 0


def test_gates_stay_fp32_under_autocast(small_model) -> None:
    gates = next(module for module in small_model("lmm", torch.float32).modules() if isinstance(module, GateProjection))
    x = torch.randn(2, 5, gates.weight.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        found = gates(x)
    for got, wanted in zip(found, gates(x), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, wanted)
