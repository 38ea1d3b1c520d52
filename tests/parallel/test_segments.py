"""The schedule of segments against whole sequences and gradients detached by hand, and what it keeps in between."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model import ModelState, TitansLM
from parallel.boundary_states import DeviceStates, Place, State, open_boundary_states
from parallel.segments import Forward, Segments, SegmentsResult, run_segments
from tests.model_cases import CASES, build_model, random_tokens

ROWS, LENGTH = 2, 32
CUTS = {
    "two": [16] * 2,
    "four": [8] * 4,
    "sixteen": [2] * 16,
    "uneven": [5, 11, 1, 12, 3],
}


def forward_of(model: TitansLM) -> Forward:
    def forward(tokens: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State, int]:
        output = model(tokens, ModelState.from_tensors(state) if state else None, targets=targets)
        return output.loss_sum, output.state.flat(), tokens.shape[1]

    return forward


def sequence(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    targets = random_tokens(ROWS, length, seed=1)
    targets[0, : length // 3] = -100
    return random_tokens(ROWS, length), targets


def pieces_of(cut: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    tokens, targets = sequence(sum(cut))
    return list(zip(tokens.split(list(cut), 1), targets.split(list(cut), 1), strict=True))


def initial_state(model: TitansLM) -> State:
    """The state after some other tokens, whose tensors ask for gradients where they can have them."""
    with torch.no_grad():
        state = model(random_tokens(ROWS, 11, seed=3)).state.flat()
    return {
        name: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


Gradients = dict[str, Tensor]


def gradients_of(model: TitansLM, state: State | None) -> Gradients:
    held = {name: parameter.grad for name, parameter in model.named_parameters()}
    held |= {f"state {name}": tensor.grad for name, tensor in (state or {}).items()}
    return {name: gradient for name, gradient in held.items() if gradient is not None}


@functools.cache
def by_hand(case: str, cut: tuple[int, ...], stretch: int, *, with_state: bool = False) -> tuple[Tensor, Gradients]:
    """Loss and gradients with everything in one graph, but that the state is detached every `stretch` segments."""
    model = build_model(case)
    initial = initial_state(model) if with_state else None
    state = None if initial is None else ModelState.from_tensors(initial)
    loss = torch.zeros((), dtype=torch.float64)
    for index, (tokens, targets) in enumerate(pieces_of(cut)):
        if state is not None and index > 0 and index % stretch == 0:
            state = state.detach()
        output = model(tokens, state, targets=targets)
        loss, state = loss + output.loss_sum, output.state
    (3 * loss).backward()
    return loss.detach(), gradients_of(model, initial)


def scheduled(
    case: str,
    cut: Sequence[int],
    truncate_every: int | None = None,
    *,
    with_state: bool = False,
    place: Place = "device",
    folder: Path | None = None,
) -> tuple[SegmentsResult, Gradients]:
    model = build_model(case)
    initial = initial_state(model) if with_state else None
    with open_boundary_states(place, folder) as boundaries:
        result = run_segments(
            pieces_of(cut),
            forward_of(model),
            lambda loss: loss.backward(),
            boundaries=boundaries,
            scale=3,
            state=initial,
            truncate_every=truncate_every,
        )
    return result, gradients_of(model, initial)


def assert_same_gradients(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        atol = 1e-9 * float(gradient.abs().max()) if gradient.numel() else 0.0
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", CUTS)
def test_exact_gradients_are_those_of_the_whole_sequence(case: str, cut: str) -> None:
    """Of every parameter, and of the state that the sequence begins with."""
    loss, expected = by_hand(case, (LENGTH,), 1, with_state=True)
    result, found = scheduled(case, CUTS[cut], with_state=True)
    torch.testing.assert_close(result.loss_sum, loss, rtol=1e-12, atol=0.0)
    assert any(name.startswith("state") and gradient.abs().max() > 1e-3 for name, gradient in expected.items())
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("case", ["mac", "lmm-softmax", "delta"])
def test_a_sequence_from_its_beginning(case: str) -> None:
    _, expected = by_hand(case, (LENGTH,), 1)
    _, found = scheduled(case, CUTS["uneven"])
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("case", ["mac", "mal", "lmm", "transformer-window"])
def test_the_place_of_the_states_changes_no_bit(case: str, place: Place, tmp_path: Path) -> None:
    on_device, expected = scheduled(case, CUTS["uneven"], with_state=True)
    elsewhere, found = scheduled(case, CUTS["uneven"], with_state=True, place=place, folder=tmp_path)
    assert torch.equal(on_device.loss_sum, elsewhere.loss_sum)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("cut", "every"), [("four", 1), ("uneven", 2)])
def test_truncated_gradients_are_those_of_a_state_detached_by_hand(case: str, cut: str, every: int) -> None:
    loss, expected = by_hand(case, tuple(CUTS[cut]), every, with_state=True)
    result, found = scheduled(case, CUTS[cut], every, with_state=True)
    torch.testing.assert_close(result.loss_sum, loss, rtol=1e-12, atol=0.0)
    assert_same_gradients(found, expected)
    _, exact = by_hand(case, (LENGTH,), 1, with_state=True)
    assert any((exact[name] - gradient).abs().max() > 1e-6 for name, gradient in found.items())


@pytest.mark.parametrize("every", [4, 5, 100])
def test_a_gradient_that_is_cut_behind_the_row_is_exact(every: int) -> None:
    _, exact = scheduled("mac", CUTS["four"])
    _, found = scheduled("mac", CUTS["four"], every)
    assert all(torch.equal(found[name], gradient) for name, gradient in exact.items())


@pytest.mark.parametrize("every", [None, 1, 2])
def test_the_state_after_the_sequence_and_what_forward_handed_back_are_in_order(every: int | None) -> None:
    model = build_model("mal")
    with torch.no_grad():
        expected = model(sequence()[0]).state.flat()
    result, _ = scheduled("mal", CUTS["uneven"], every)
    assert result.asides == CUTS["uneven"]
    assert not any(tensor.requires_grad for tensor in [result.loss_sum, *result.state.values()])
    for name, tensor in expected.items():
        torch.testing.assert_close(result.state[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("every", "calls"),
    [
        (None, "0 1 2 3+^ 2+^ 1+^ 0+"),
        (1, "0+ 1+ 2+ 3+"),
        (2, "0 1+^ 0+ 2 3+^ 2+"),
        (3, "0 1 2+^ 1+^ 0+ 3+"),
    ],
)
def test_no_segment_runs_more_often_than_it_must(every: int | None, calls: str) -> None:
    """Only the last one of a stretch runs once; those with + have a graph, those with ^ a gradient for their state."""
    seen: list[str] = []

    def forward(tokens: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State, None]:
        wanted = any(tensor.requires_grad for tensor in state.values())
        seen.append(f"{int(tokens)}{'+' * torch.is_grad_enabled()}{'^' * wanted}")
        weight = torch.ones((), requires_grad=True)
        return weight.clone(), {"x": weight + state["x"] if state else weight.clone()}, None

    pieces = [(torch.tensor([[index]]),) * 2 for index in range(4)]
    run_segments(pieces, forward, lambda loss: loss.backward(), boundaries=DeviceStates(), truncate_every=every)
    assert " ".join(seen) == calls


def test_a_state_that_a_segment_ignores_has_no_gradient_and_breaks_nothing() -> None:
    """`old` is not read in the third segment, `constant` depends on nothing, `count` is an integer."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def forward(tokens: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State, None]:
        number = int(tokens)
        state = state or {"kept": weight * 1, "old": weight * 1, "constant": torch.ones(()), "count": torch.tensor(0)}
        old = weight * number if number == 2 else state["old"] * weight
        kept = state["kept"] * weight + number
        after = {"kept": kept, "old": old, "constant": torch.ones(()), "count": state["count"] + 1}
        return kept * old * state["constant"].to(old) * after["count"], after, None

    pieces = [(torch.tensor([[index]]),) * 2 for index in range(4)]
    state: State = {}
    total = torch.zeros((), dtype=torch.float64)
    for piece in pieces:
        loss, state, _ = forward(*piece, state)
        total = total + loss
    (expected,) = torch.autograd.grad(total, weight)
    result = run_segments(pieces, forward, lambda loss: loss.backward(), boundaries=DeviceStates())
    torch.testing.assert_close(result.loss_sum, total.detach())
    torch.testing.assert_close(weight.grad, expected, rtol=1e-14, atol=0.0)


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def watched_graphs() -> Iterator[list[int]]:
    """Yields [bytes that graphs hold now, the most so far]."""
    held = [0, 0]

    def release(size: int) -> None:
        held[0] -= size

    def pack(tensor: Tensor) -> Saved:
        saved, size = Saved(tensor), tensor.numel() * tensor.element_size()
        weakref.finalize(saved, release, size)
        held[0] += size
        held[1] = max(held)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield held


class CountedStates(DeviceStates):
    """Counts what waits."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.devices_tensors: list[weakref.ref[Tensor]] = []

    def put(self, segment: int, state: State) -> None:
        super().put(segment, state)
        self.most = max(self.most, len(self._states))
        self.devices_tensors += [weakref.ref(tensor) for tensor in state.values()]


def graph_peak(model: TitansLM, cut: Sequence[int], every: int | None = None) -> tuple[int, CountedStates]:
    boundaries = CountedStates()
    with watched_graphs() as held:
        run_segments(
            pieces_of(cut),
            forward_of(model),
            lambda loss: loss.backward(),
            boundaries=boundaries,
            truncate_every=every,
        )
    assert held[0] == 0
    return held[1], boundaries


@pytest.mark.parametrize("case", ["mac", "lmm", "transformer-window"])
def test_graphs_hold_one_segment_at_a_time_whatever_the_length(case: str) -> None:
    model = build_model(case)
    three, _ = graph_peak(model, [16] * 3)
    six, boundaries = graph_peak(model, [16] * 6)
    whole, _ = graph_peak(model, [16 * 6])
    assert six == three
    assert whole > 3 * six
    assert boundaries.most == 4  # one leads into each but the first and the last, whose states are at hand
    assert not any(reference() is not None for reference in boundaries.devices_tensors)


def live_bytes() -> int:
    """Of every floating-point tensor that Python holds."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.is_floating_point()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("every", [None, 3])
def test_no_state_stays_but_those_that_wait(every: int | None, tmp_path: Path) -> None:
    """With those on disk, a row of any length has the memory of a short one."""
    model = build_model("mac")
    peaks = []
    for count in (3, 6):
        held: list[int] = []

        def backward(loss: Tensor, held: list[int] = held) -> None:
            loss.backward()
            held.append(live_bytes())

        with open_boundary_states("disk", tmp_path) as boundaries:
            run_segments(
                pieces_of([8] * count), forward_of(model), backward, boundaries=boundaries, truncate_every=every
            )
        assert len(held) == count
        peaks.append(max(held))
    assert peaks[1] <= peaks[0] + 8 * 6  # the losses of the other segments


@pytest.mark.parametrize("case", ["mac", "lmm"])
def test_gradients_of_the_memory_cross_boundaries_in_fp32_whatever_the_model_runs_in(case: str) -> None:
    """A leaf's gradient has its dtype; of the layers' bf16 activations (tails, keys, values) it stays bf16."""
    crossed: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    leaves: list[State] = []
    run = forward_of(build_model(case, torch.bfloat16))

    def forward(tokens: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State, int]:
        leaves.append(state)
        return run(tokens, targets, state)

    run_segments(pieces_of(CUTS["four"]), forward, lambda loss: loss.backward(), boundaries=DeviceStates())
    for state in leaves:
        crossed |= {name: (leaf.dtype, leaf.grad.dtype) for name, leaf in state.items() if leaf.grad is not None}
    assert any(dtypes == (torch.bfloat16,) * 2 for dtypes in crossed.values())
    memory = {name: dtypes for name, dtypes in crossed.items() if "weights" in name or "momentum" in name}
    assert memory and set(memory.values()) == {(torch.float32,) * 2}


def test_only_the_states_of_one_stretch_wait() -> None:
    _, boundaries = graph_peak(build_model("lmm"), [4] * 12, every=4)
    assert boundaries.most == 3
    assert boundaries._states == {}


def test_disk_states_leave_nothing_behind_an_error(tmp_path: Path) -> None:
    def fail(_: Tensor) -> None:
        assert any(tmp_path.rglob("*.safetensors"))
        raise RuntimeError("in the backward pass")

    with (
        pytest.raises(RuntimeError, match="in the backward pass"),
        open_boundary_states("disk", tmp_path) as boundaries,
    ):
        run_segments(pieces_of(CUTS["four"]), forward_of(build_model("lmm")), fail, boundaries=boundaries)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("cut", "every"), [([], None), ([4, 4], 0)])
def test_nothing_to_run_is_refused(cut: list[int], every: int | None) -> None:
    pieces = pieces_of(cut) if cut else []
    with pytest.raises(ValueError, match="at least one piece"):
        run_segments(
            pieces, forward_of(build_model("lmm")), lambda _: None, boundaries=DeviceStates(), truncate_every=every
        )


def test_rows_that_are_not_of_the_segments_length_are_refused() -> None:
    segments = Segments(length=8, count=4)
    assert [(tokens.shape[1], resets) for tokens, _, resets in segments.cut(*sequence(32))] == [(8, None)] * 4
    resets = torch.arange(64).view(2, 32) % 3 == 0
    pieces = segments.cut(*sequence(32), resets)
    assert torch.equal(torch.cat([piece[2] for piece in pieces], 1), resets) and len(pieces) == 4
    with pytest.raises(ValueError, match="40 tokens are not 4 segments of 8"):
        segments.cut(*sequence(40))
