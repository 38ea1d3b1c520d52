"""Which backend computes the memory, and what it says of its choice, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from kernels.memory import explain_backend, neural_memory
from kernels.memory.choice import BACKENDS, choose
from kernels.memory.chunk import GroupTokens
from kernels.memory.options import MemoryOptions
from kernels.memory.problem import Problem
from tests.kernels.memory_cases import make_inputs, make_weights
from tests.model_cases import build_model

pytest.importorskip("triton")

from kernels.memory.triton import group, group_gradient
from kernels.memory.triton.backend import MAX_TILE, MAX_TILE_ELSEWHERE, TritonKernels, refusal, refusal_of_shape

CUDA = torch.device("cuda", 0)


def problem(
    dims: tuple[int, ...] = (64, 128, 64), dtype: torch.dtype | None = torch.bfloat16, device=CUDA, **options
) -> Problem:
    return Problem(device, dtype, dims, MemoryOptions(**{"chunk_size": 64, **options}), "tf32")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": None}, "alike for q, k and v"),
        ({"dims": (64, 128, 128, 64)}, "3 layers"),
        ({"dims": (48, 128, 48)}, "48 dimensions"),
        ({"dims": (64, 100, 64)}, "hidden width is 100"),
        ({"activation": "softmax"}, "softmax"),
        ({"chunk_size": 256}, "256 tokens"),
        ({"device": torch.device("cpu")}, "the tensors are on cpu"),
    ],
)
def test_what_the_kernels_do_not_take_is_computed_by_the_dual_form_and_said(change: dict, reason: str) -> None:
    choice = choose(problem(**change), "auto")
    assert choice.backend.name == "dual" and reason in choice.reason
    with pytest.raises(ValueError, match=reason):
        choose(problem(**change), "triton")


def test_auto_leaves_kernels_that_no_gpu_has_run_to_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    choice = choose(problem(dims=(64, 192, 64)), "auto")
    assert choice.backend.name == "dual" and "not been run on a GPU" in choice.reason


def test_gpus_without_bf16_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability \(7, 5\)"):
        choose(problem(dims=(64, 320, 64)), "triton")


def test_what_fits_hopper_only_is_refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = problem(dims=(128, 448, 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ValueError, match="chunks of 64 tokens of 128 dimensions do not fit"):
        choose(wide, "triton")
    assert refusal_of_shape(problem(chunk_size=64), MAX_TILE_ELSEWHERE) is None
    for dims, chunk in (((64, 128, 64), 64), ((64, 64), 128)):
        of_fp32 = problem(dims, torch.float32, chunk_size=chunk)
        assert "do not fit" in refusal_of_shape(of_fp32, MAX_TILE_ELSEWHERE)
        assert refusal_of_shape(of_fp32, MAX_TILE) is None
    for chunk, dtype, fits in ((16, torch.bfloat16, True), (32, torch.bfloat16, False), (16, torch.float32, False)):
        of_wide_heads = problem((128, 256, 128), dtype, chunk_size=chunk)
        assert (refusal_of_shape(of_wide_heads, MAX_TILE_ELSEWHERE) is None) == fits
        assert refusal_of_shape(of_wide_heads, MAX_TILE) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert refusal(wide) is None
    with pytest.raises(ValueError, match="chunks of 128 tokens of 128 dimensions do not fit"):
        choose(problem(dims=(128, 448, 128), chunk_size=128), "triton")


def test_fp32_is_taken_where_its_products_may_be_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("kernels.memory.triton.backend.precision_of", lambda _: "tf32")
    assert refusal(problem(dtype=torch.float32)) is None
    monkeypatch.setattr("kernels.memory.triton.backend.precision_of", lambda _: "ieee")
    assert "set_float32_matmul_precision" in refusal(problem(dtype=torch.float32))


def test_without_triton_the_dual_form_computes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels.memory.triton.backend", None)
    unseen = problem(dims=(32, 32))
    assert choose(unseen, "auto").backend.name == "dual"
    with pytest.raises(ValueError, match="Triton can't be imported"):
        choose(unseen, "triton")


def test_the_choice_is_explained_for_a_call_as_it_would_be_made() -> None:
    (q, k, v, *_), weights = make_inputs(3, dtype=torch.float32), make_weights(2, dtype=torch.float32)
    assert explain_backend(q, k, v, weights, chunk_size=4).startswith("dual: the tensors are on cpu")


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_a_name_that_is_no_choice_is_refused_and_not_explained(backend: str) -> None:
    (q, k, v, *_), weights = make_inputs(3), make_weights(2)
    with pytest.raises(ValueError, match=f"backend is '{backend}'; it must be one of auto, dual, triton$"):
        explain_backend(q, k, v, weights, chunk_size=4, backend=backend)


def test_the_model_takes_the_names_that_can_be_chosen() -> None:
    model = build_model("mag")
    for backend in BACKENDS:
        model.set_memory_backend(backend)
    with pytest.raises(ValueError, match="memory backend is 'reference': choose one of auto, dual, triton"):
        model.set_memory_backend("reference")


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, launched = [], []

    @contextlib.contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        inside.append(x)
        yield
        inside.pop()

    def launch(name: str) -> Callable[..., list[str]]:
        return lambda *_: launched.append((name, *inside)) or [name]

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, name in ((group, "write_group"), (group, "read_group"), (group_gradient, "group_gradients")):
        monkeypatch.setattr(module, name, launch(name))
    q, k, v, *gates = make_inputs(3)
    tokens, options = GroupTokens(q, k, v, *gates), MemoryOptions(4)
    TritonKernels.write(tokens, None, [], [], options, True)
    TritonKernels.read(q, None, [], None, options)
    TritonKernels.gradients(tokens, [], [], options, q, None)
    assert [name for name, *_ in launched] == ["write_group", "read_group", "group_gradients"]
    assert [x is y for (_, *xs), y in zip(launched, (k, q, k), strict=True) for x in xs] == [True] * 3


def test_an_order_that_can_not_be_followed_is_an_error() -> None:
    with pytest.raises(ValueError, match="backend 'triton' does not take this memory: the tensors are on cpu"):
        neural_memory(*make_inputs(3), make_weights(2), chunk_size=4, backend="triton")
