"""How the model computes: `parallel.attention_backend`, `memory_backend` and `compile` reach it, and a backend that
can't compute its attention or memory is refused by name.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._inductor.config
import yaml

from model.attention import AttentionLayer
from model.compiled import PARTS
from model.memory import MemoryCore
from parallel.mesh import Mesh
from parallel.process import World
from pretrain import loop
from pretrain.config import load_recipe
from pretrain.errors import UserError
from pretrain.phases import Phases
from tests.distributed_helper import run_ranks
from tests.training_cases import events, make_data, pretrain, recipe_fields, write_recipe

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *overrides: tuple[str, str]) -> torch.nn.Module:
    """The model that is handed to the engine."""
    monkeypatch.setattr(loop, "make_engine", lambda model, *arguments, **options: model)
    recipe = load_recipe(write_recipe(Path("shards"), tmp_path / "run"), overrides)
    return loop.build_engine(recipe, recipe.batches(1), Mesh.data_parallel(WORLD))


def explained(tmp_path: Path, *overrides: tuple[str, str]) -> dict[str, str]:
    """What a run says at its start of what computes."""
    recipe = load_recipe(write_recipe(Path("shards"), tmp_path / "run"), overrides)
    return loop.explain_backends(Phases.alone(recipe)[0], WORLD)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_it_reaches_every_layer(backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = built(monkeypatch, tmp_path, ("parallel.attention_backend", backend))
    assert [m.backend for m in model.modules() if isinstance(m, AttentionLayer)] == [backend, backend]


def test_one_that_does_not_take_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        explained(tmp_path, ("parallel.attention_backend", "flash"))
    message = str(caught.value)
    assert message.startswith("parallel.attention_backend: attention backend 'flash' does not take this attention: ")
    assert "second stream" in message
    assert "choose 'auto'" in message


@pytest.mark.parametrize("backend", ["auto", "dual"])
def test_the_memory_s_reaches_every_layer(backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = built(monkeypatch, tmp_path, ("parallel.memory_backend", backend))
    assert [m.backend for m in model.modules() if isinstance(m, MemoryCore)] == [backend, backend]


def test_kernels_that_do_not_take_the_memory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        explained(tmp_path, ("parallel.memory_backend", "triton"))
    message = str(caught.value)
    assert message.startswith("parallel.memory_backend: backend 'triton' does not take this memory: ")
    assert "the tensors are on cpu" in message


def test_a_run_says_what_computes_also_where_nothing_was_asked_for(tmp_path: Path) -> None:
    found = explained(tmp_path)
    assert set(found) == {"attention", "memory"}
    assert found["attention"].startswith("sdpa: the first that takes this\nnot flash: ")
    assert found["memory"].startswith("dual: the tensors are on cpu")
    assert explained(tmp_path, ("parallel.attention_backend", "math"))["attention"] == "math: asked for"


@pytest.mark.parametrize("words", [("data.reset_memory", "true"), ("data.order", "streams")])
def test_attention_over_documents_is_asked_for_at_the_start(
    words: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = loop.explain_attention_backend

    def explain(*arguments, documents: bool = False, **options) -> str:
        if documents:
            raise ValueError("there are documents")
        return real(*arguments, **options)

    assert "attention_over_documents" in explained(tmp_path, words)
    monkeypatch.setattr(loop, "explain_attention_backend", explain)
    assert "attention_over_documents" not in explained(tmp_path)
    with pytest.raises(UserError, match="parallel.attention_backend: there are documents"):
        explained(tmp_path, words)


def test_a_later_phase_s_backend_is_refused_before_the_first_step(tmp_path: Path) -> None:
    fields = recipe_fields(make_data(tmp_path / "data", number=60), tmp_path / "run")
    fields["phases"] = [
        {"name": "first", "training": {"tokens": 256}},
        {"name": "second", "training": {"tokens": 256}, "parallel": {"memory_backend": "triton"}},
    ]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    done = pretrain(path, check=False)
    assert "phase second (2 of 2): parallel.memory_backend: backend 'triton' does not take" in done.report()
    assert done.codes == [2] and not events(tmp_path / "run", "start")


def test_a_model_without_memory_has_no_backend_for_it(tmp_path: Path) -> None:
    words = [("parallel.memory_backend", "dual"), ("model.preset", "transformer-tiny")]
    with pytest.raises(UserError, match="parallel.memory_backend is dual, but model.variant transformer has no memory"):
        load_recipe("launch/recipes/titans-170m.yaml", words)


@pytest.mark.parametrize("compiled", [False, True])
def test_compile_reaches_every_part(compiled: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = built(monkeypatch, tmp_path, ("parallel.compile", str(compiled).lower()))
    parts = [module for module in model.modules() if isinstance(module, PARTS)]
    assert [hasattr(part.forward, "_torchdynamo_orig_callable") for part in parts] == [compiled] * len(parts)


def test_compiling_without_a_compiler_is_refused_by_its_field(tmp_path: Path) -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert explained(tmp_path)
        with pytest.raises(UserError, match=r"^parallel\.compile: No working C\+\+ compiler .*no-such-compiler"):
            explained(tmp_path, ("parallel.compile", "true"))


@pytest.mark.slow
def test_compiled_runs_follow_the_others_with_their_parameters_shared_out(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    recipes = [
        write_recipe(
            data, tmp_path / f"{stage}-{compiled}", steps=4, parallel={"zero_stage": stage, "compile": compiled}
        )
        for stage in (1, 3)
        for compiled in (False, True)
    ]
    run_ranks(["tests/pretrain/train_worker.py", *map(str, recipes)], ranks=2, timeout=900)
    for stage in (1, 3):
        plain, compiled = (events(tmp_path / f"{stage}-{value}", "step") for value in (False, True))
        for name in ("loss", "gradient_norm"):
            assert [e[name] for e in compiled] == pytest.approx([e[name] for e in plain], rel=1e-4)
