"""The choice of a backend, what each takes, and that each gives the formula's numbers and gradients."""

import inspect
import itertools
import logging
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.attention.varlen as torch_varlen
from torch import Tensor
from torch.nn.functional import pad

from kernels.attention import BACKENDS, attention, choice, explain_attention, flash, flex, packed
from kernels.attention.inputs import Prefix, prepare, visible
from tests.kernels import attention_standins
from tests.kernels.attention_cases import draw_inputs, first_visible_keys, run_attention, with_gradients

FUSED = ("flash", "varlen", "flex")
README = Path(attention_standins.__file__).parents[2] / "kernels" / "attention" / "README.md"


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    attention_standins.install(monkeypatch)
    yield
    attention_standins.forget()


def bounds(kind: str, length: int, total: int) -> dict[str, Tensor]:
    if kind == "row":
        return {"first_valid": torch.tensor([0, (total - length) // 2 + 1])}
    return {"first_visible": first_visible_keys(length, total)} if kind == "query" else {}


CASES = {
    "full": {},
    "window": {"window": 4},
    "prefix": {"has_prefix": True},
    "window and prefix": {"window": 4, "has_prefix": True},
    "second stream (MAC)": {"has_context": True},
    "second stream and prefix (MAC)": {"has_context": True, "has_prefix": True},
    "documents": {"bound": "query"},
    "window and documents": {"window": 4, "bound": "query"},
    "window, prefix and documents": {"window": 4, "has_prefix": True, "bound": "query"},
    "behind a cache": {"total": 17, "bound": "row"},
    "window and prefix behind a cache": {"total": 17, "window": 4, "has_prefix": True, "bound": "row"},
    "decoding": {"length": 1, "total": 17, "bound": "row"},
    "decoding, window and prefix": {"length": 1, "total": 17, "window": 4, "has_prefix": True, "bound": "row"},
    "decoding, second stream (MAC)": {"length": 1, "total": 17, "has_context": True, "bound": "row"},
}


def case_inputs(
    length: int = 13,
    total: int = 13,
    window: int | None = None,
    has_prefix: bool = False,
    has_context: bool = False,
    bound: str = "none",
) -> tuple[dict[str, Tensor], dict]:
    tensors = draw_inputs(length, total, has_prefix, has_context, torch.float64)
    return tensors, {"window": window, **bounds(bound, length, total)}


def takes(case: str, backend: str) -> bool:
    tensors, options = case_inputs(**CASES[case])
    try:
        run_attention(tensors, **options, backend=backend)
    except ValueError as error:
        assert f"backend {backend!r} does not take this attention: " in str(error)
        return False
    return True


def test_the_readme_says_what_each_backend_takes(stand_ins) -> None:
    table = README.read_text().split("What each takes")[1]
    rows = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in row] for row in rows]
    assert header[1:] == list(BACKENDS[1:])
    assert [row[0] for row in rows] == list(CASES)
    for name, *cells in rows:
        assert cells == ["yes" if takes(name, backend) else "-" for backend in header[1:]], name


SHAPES = [(1, 1), (13, 13), (13, 16), (9, 40), (40, 40), (1, 9), (37, 41)]


@pytest.mark.parametrize(
    ("backend", "length", "total"),
    [
        *itertools.chain(*([("flash", *shape), ("varlen", *shape)] for shape in SHAPES)),
        ("flex", 1, 9),
        ("flex", 37, 41),
    ],
)
def test_outputs_and_gradients_equal_the_formula(backend: str, length: int, total: int, stand_ins) -> None:
    taken = 0
    for window, has_prefix, has_context, bound in itertools.product(
        (None, 1, 4, 13, 30), (False, True), (False, True), ("none", "row", "query")
    ):
        tensors, options = case_inputs(length, total, window, has_prefix, has_context, bound)
        try:
            out = run_attention(tensors, **options, backend=backend)
        except ValueError as error:
            assert "does not take this attention" in str(error)
            continue
        taken += 1
        expected = with_gradients(run_attention(tensors, **options, backend="math"), tensors)
        for got, wanted in zip(with_gradients(out, tensors), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)
    assert taken == (0 if backend == "flex" and length == 1 else 60 if backend == "flex" else 25 if length > 1 else 30)


def test_flash_decodes_without_gradient_by_its_kernel_for_caches(stand_ins, monkeypatch) -> None:
    called = []
    real = attention_standins.flash_attn_with_kvcache
    spy = lambda *args, **options: called.append(options) or real(*args, **options)  # noqa: E731
    spy.__signature__ = inspect.signature(real)
    monkeypatch.setattr("flash_attn.flash_attn_with_kvcache", spy)
    for window, bound in itertools.product((None, 4), ("none", "row", "query")):
        tensors, options = case_inputs(1, 17, window, bound=bound)
        with torch.no_grad():
            got = run_attention(tensors, **options, backend="flash")
        torch.testing.assert_close(got, run_attention(tensors, **options, backend="math"), rtol=1e-11, atol=1e-12)
    assert {options["cache_seqlens"] for options in called} >= {17, 4}
    assert {options["cache_leftpad"] is None for options in called} == {True, False}


def test_the_stand_ins_have_the_signature_of_what_is_installed() -> None:
    mine, real = (
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (attention_standins.varlen_attn, torch_varlen.varlen_attn)
    )
    needed = {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size"}
    assert [p for p in mine if p[0] in needed] == [p for p in real if p[0] in needed]


def test_documents_that_overlap_go_to_a_backend_with_masks(stand_ins) -> None:
    tensors, options = case_inputs(13, 13)
    sliding = (torch.arange(13) - 3).clamp(min=0).expand(2, -1)
    with pytest.raises(ValueError, match="'varlen' does not take this attention: documents overlap"):
        run_attention(tensors, first_visible=sliding, backend="varlen")
    out = run_attention(tensors, first_visible=sliding, backend="flex")
    torch.testing.assert_close(out, run_attention(tensors, window=4, backend="math"), rtol=1e-11, atol=1e-12)


def test_rows_too_long_for_lists_of_blocks_go_elsewhere() -> None:
    for length, taken in ((2**18, True), (2**18 + 1, False)):
        x = torch.zeros(()).expand(1, length, 1, 16)
        assert (flex.misfit(prepare(x, x, x, 512, None, None, None, None)) is None) == taken


def test_changed_bounds_are_read_again(stand_ins) -> None:
    tensors, _ = case_inputs(13, 13)
    bound = first_visible_keys(13, 13)
    for change in (lambda: None, lambda: bound.zero_(), lambda: bound.copy_(torch.arange(13))):
        change()
        got, expected = (run_attention(tensors, first_visible=bound, backend=name) for name in ("varlen", "math"))
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_the_host_reads_the_bounds_of_all_layers_once(stand_ins, monkeypatch) -> None:
    from kernels.attention import documents

    reads = []
    real = documents._read
    monkeypatch.setattr(documents, "_read", lambda inputs: reads.append(1) or real(inputs))
    tensors, options = case_inputs(13, 13, bound="query")
    for _ in range(3):
        run_attention(tensors, **options, backend="varlen")
    assert sum(reads) == 2, "once for the self-test's bounds, once for these"


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("length, total, window", [(300, 300, None), (300, 300, 70), (200, 461, 300), (129, 400, None)])
def test_flex_skips_only_blocks_that_are_not_seen_and_checks_all_that_are_seen_in_part(
    length: int, total: int, window: int | None, documents: bool, streams: int
) -> None:
    q, k = torch.zeros(2, length, 1, 8), torch.zeros(2, total, 1, 8)
    first_visible = first_visible_keys(length, total) if documents else None
    inputs = prepare(q, k, k, window, None, (k, k) if streams == 2 else None, None, first_visible)
    sees = visible(torch.arange(total - length, total), torch.arange(total), inputs.window, inputs.first_visible)
    sees = torch.cat([sees] * streams, -1)
    own, lower = torch.arange(total - length, total), torch.arange(total - length, total)[None] - inputs.window + 1
    lower = lower.clamp(min=0) if first_visible is None else torch.maximum(lower.clamp(min=0), first_visible)
    reached, whole = flex._blocks(own, lower, torch.arange(total).repeat(streams))

    def tiles(value: bool) -> Tensor:
        blocks = (0, -sees.shape[-1] % flex.BLOCK, 0, -length % flex.BLOCK)
        padded = pad(sees.expand(len(lower), 1, -1, -1), blocks, value=value)
        return padded.unflatten(3, (-1, flex.BLOCK)).unflatten(2, (-1, flex.BLOCK))

    seen, all_seen = tiles(False).any(-1).any(3), tiles(True).all(-1).all(3)
    assert not (seen & ~reached).any(), "a block that is seen is skipped"
    assert not (whole & ~all_seen).any(), "a block is taken for seen by all, and is not"
    assert not (whole & ~reached).any(), "a block that is seen by all is skipped"
    if streams == 1:
        assert torch.equal(seen, reached), "a block that is not seen is computed"
    assert whole.any() == (window != 70), "no block is spared the look at its pairs"
    mask = flex._block_mask(inputs)
    assert torch.equal(mask.to_dense().bool(), reached)
    assert (mask.kv_num_blocks + mask.full_kv_num_blocks).sum() == reached.sum(), "a block is listed twice"


def test_more_kinds_of_calls_than_the_compiler_keeps_graphs_for_by_itself(monkeypatch) -> None:
    compiled, graphs = torch.compile, []

    def traced(function, **options):
        return compiled(function, backend=lambda graph, _: graphs.append(graph) or graph.forward, **options)

    monkeypatch.setattr(torch, "compile", traced)  # without the compiler proper, which takes a minute
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    try:
        for dtype, rows, heads in itertools.product((torch.float32, torch.float16, torch.bfloat16), (1, 2), (1, 2)):
            q = torch.randn(rows, 130, heads, 16).to(dtype)
            inputs = prepare(q, q, q, 70, None, None, None, None)
            expected = choice.attention_reference(inputs)
            torch.testing.assert_close(flex.run(inputs), expected, rtol=3e-2, atol=3e-2)
    finally:
        flex._compiled.cache_clear()
        torch._dynamo.reset()
    assert len(graphs) > 9, "these are too few to meet a limit"


@pytest.mark.slow  # a minute of compiling
def test_flex_compiled_skips_blocks_and_gives_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 300, 2, 16, generator=generator) for _ in range(3))
    options = {"window": 70, "first_visible": first_visible_keys(300, 300)}
    got, expected = (attention(q, k, v, **options, backend=backend) for backend in ("flex", "math"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_flex_has_the_gradient_of_its_log_sum_exp(monkeypatch) -> None:
    # Torch's own forward and backward, made one by its tracer but not compiled; only the check of the device is in the
    # way on a CPU.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_warn_once", lambda *args, **options: None)
    tensors, options = case_inputs(13, 16, 4, has_prefix=True, has_context=True, bound="query")
    prefix = Prefix(tensors["plain_q"], tensors["prefix_k"], tensors["prefix_v"])
    context = (tensors["context_k"], tensors["context_v"])
    inputs = prepare(tensors["q"], tensors["k"], tensors["v"], 4, prefix, context, None, options["first_visible"])
    out = flex.attention_flex(inputs, torch_flex.flex_attention).transpose(1, 2)
    expected = with_gradients(run_attention(tensors, **options, backend="math"), tensors)
    for got, wanted in zip(with_gradients(out, tensors), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


def test_the_first_that_takes_a_call_is_chosen_and_the_others_say_why_not(stand_ins, monkeypatch) -> None:
    monkeypatch.setattr(choice, "_disadvantage", lambda backend, problem: None)
    found = {}
    for name, case in CASES.items():
        tensors, options = case_inputs(**case)
        given = {key: tensors[key] for key in ("q", "k", "v")}
        if "plain_q" in tensors:
            options["prefix"] = Prefix(tensors["plain_q"], tensors["prefix_k"], tensors["prefix_v"])
        if "context_k" in tensors:
            options["context"] = (tensors["context_k"], tensors["context_v"])
        found[name] = explain_attention(**given, **options)
    assert found["window and prefix"] == "flash: the first that takes this"
    assert (
        found["second stream (MAC)"].startswith("flex: ")
        and "not varlen: there is a second" in found["second stream (MAC)"]
    )
    assert "documents and a prefix" in found["window, prefix and documents"]
    assert found["decoding, second stream (MAC)"].startswith("sdpa: ")
    assert "not flex: a row has no more queries" in found["decoding, second stream (MAC)"]


def test_on_a_cpu_sdpa_is_chosen_and_nothing_is_imported_for_it(monkeypatch) -> None:
    monkeypatch.setattr(flash, "_module", lambda: pytest.fail("flash_attn was looked for"))
    monkeypatch.setattr(flex, "_compiled", lambda: pytest.fail("FlexAttention was compiled"))
    tensors, options = case_inputs(**CASES["window"])
    lines = explain_attention(**tensors, **options).splitlines()
    assert lines[0] == "sdpa: the first that takes this"
    assert lines[1:] == [f"not {name}: the tensors are on cpu, its kernels are for a GPU" for name in FUSED]
    assert torch.equal(run_attention(tensors, **options), run_attention(tensors, **options, backend="sdpa"))


@pytest.mark.parametrize(
    ("backend", "change", "why"),
    [
        ("flash", {}, "the tensors are on cpu"),
        ("varlen", {}, "the tensors are on cpu"),
        ("flex", {"length": 3}, "no more queries than"),
        ("flex", {"width": 8}, "8 dimensions"),
        ("flex", {}, "no backward"),
        ("flex", {"dtype": torch.float64}, "float64"),
    ],
)
def test_a_backend_that_was_asked_for_and_can_not_says_why(backend, change, why) -> None:
    sizes = {"length": 129, "width": 16, "dtype": torch.float32, **change}
    q = torch.zeros(1, sizes["length"], 2, sizes["width"], dtype=sizes["dtype"], requires_grad=True)
    with pytest.raises(ValueError, match=f"attention backend '{backend}' does not take this attention: .*{why}"):
        attention(q, q, q, backend=backend)


def test_a_flash_attn_that_is_missing_or_old_says_so(stand_ins, monkeypatch) -> None:
    tensors, _ = case_inputs()
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", None)
    flash._missing.cache_clear(), choice._standing_refusal.cache_clear()
    with pytest.raises(ValueError, match="flash_attn can't be imported"):
        run_attention(tensors, backend="flash")
    old = types.SimpleNamespace(__version__="2.3", flash_attn_varlen_func=attention_standins.flash_attn_varlen_func)
    monkeypatch.setattr(flash, "_module", lambda: old)
    flash._missing.cache_clear(), choice._standing_refusal.cache_clear()
    with pytest.raises(ValueError, match="flash_attn 2.3 has no flash_attn_with_kvcache with cache_leftpad; 2.7"):
        run_attention(tensors, backend="flash")


def _broken(how: str):
    def function(q, k, v, *args, window_size=(-1, -1), **options):
        if how == "raises":
            raise RuntimeError("no kernel image is available for execution on the device")
        if how == "window":
            window_size = (window_size[0] + 1, 0) if window_size[0] > 0 else window_size
        if how == "gradient":
            k = k.detach() + 0.9 * (k - k.detach())
        out = attention_standins.flash_attn_varlen_func(q, k, v, *args, window_size=window_size, **options)
        return out * float("nan") if how == "nan" else out

    function.__signature__ = inspect.signature(attention_standins.flash_attn_varlen_func)
    return function


@pytest.mark.parametrize(
    ("how", "named", "without_window"),
    [
        ("raises", "RuntimeError: no kernel image", "varlen"),
        ("window", "the output is off by", "flash"),  # which is wrong in windows alone
        ("gradient", "the gradient of the keys is off by", "varlen"),
        ("nan", "the output is off by nan", "varlen"),
    ],
)
def test_kernels_that_fail_their_self_test_are_off_and_the_run_goes_on(
    how, named, without_window, stand_ins, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(choice, "_disadvantage", lambda backend, problem: None)
    monkeypatch.setattr("flash_attn.flash_attn_varlen_func", _broken(how))
    tensors, options = case_inputs(**CASES["window and prefix"])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run_attention(tensors, **options)
    (record,) = caplog.records
    assert "attention by flash is off for a window of 4 with a prefix, heads of 8" in record.message
    assert named in record.message
    with pytest.raises(ValueError, match="its self-test failed"):
        run_attention(tensors, **options, backend="flash")
    tensors, options = case_inputs(**CASES["full"])
    assert explain_attention(*tensors.values(), **options).startswith(f"{without_window}: ")


def test_the_self_test_leaves_no_trace_in_what_surrounds_it(stand_ins) -> None:
    tensors, options = case_inputs(**CASES["window"])
    saved = []
    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        run_attention(tensors, **options, backend="varlen")
    first = len(saved)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        run_attention(tensors, **options, backend="varlen")
    assert len(saved) == 2 * first > 0
    assert torch.equal(torch.get_rng_state(), state)
    attention_standins.forget()
    with torch.inference_mode():
        run_attention(tensors, **options, backend="varlen")


def test_what_is_refused_for_hardware() -> None:
    inputs = prepare(*(torch.zeros(1, 2, 2, 8) for _ in range(3)), None, None, None, None)
    problem = choice.Problem.of(inputs)
    assert "on cpu" in packed.hardware_refusal(problem)
