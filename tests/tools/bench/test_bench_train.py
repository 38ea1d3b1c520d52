"""Training steps as a benchmark: the plain loop's arithmetic, and what a row says."""

from __future__ import annotations

import argparse
import importlib.util

import pytest
import torch

from model import TitansLM
from model.attention import AttentionLayer
from model.compiled import PARTS
from model.flops import flops_per_token
from model.memory import MemoryCore
from pretrain.optimizer import OptimizerConfig, build_optimizer
from tests.model_cases import build_model, random_tokens
from tools.bench import train
from tools.bench.__main__ import main
from tools.bench.plain_loop import PlainLoop

CPU = torch.device("cpu")
OPTIONS = {"device": "cpu", "threads": 1, "repeats": 1, "steps": 1}


def stepped(model: TitansLM, steps: int) -> list[float]:
    """Losses of the plainest training there is."""
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, gradient_clip=0.5), CPU)
    losses = []
    for step in range(steps):
        tokens = random_tokens(2, 13, step)
        loss = model(tokens[:, :-1], targets=tokens[:, 1:]).loss_sum / 24
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_the_plain_loop_trains_as_torch_alone_does() -> None:
    wanted = stepped(build_model("mag", torch.float32), 3)
    loop = PlainLoop(build_model("mag", torch.float32), OptimizerConfig(gradient_clip=0.5), CPU, "fp32")
    found = [float(loop.train_step(t[:, :-1], t[:, 1:], 1e-2)) for t in (random_tokens(2, 13, n) for n in range(3))]
    assert found == pytest.approx(wanted, rel=1e-6)


def test_with_bf16_the_masters_keep_what_bf16_would_lose() -> None:
    loop = PlainLoop(build_model("mag", torch.float32), OptimizerConfig(), CPU, "bf16")
    tokens = random_tokens(2, 13)
    before = [master.clone() for master in loop._masters]
    loop.train_step(tokens[:, :-1], tokens[:, 1:], 1e-6)
    assert {p.dtype for p in loop.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loop._masters} == {torch.float32}
    moved = sum(float((a - b).abs().sum()) for a, b in zip(before, loop._masters, strict=True))
    assert moved > 0
    for master, own in zip(loop._masters, loop._copies, strict=True):
        assert torch.equal(master.bfloat16(), own) and own.grad is None


def test_a_row_says_speed_memory_and_operations() -> None:
    found = train.measure(
        preset="mag-tiny", length=32, batch=2, loop="plain", dtype="fp32", activations="recomputed", **OPTIONS
    )
    config = train.ModelConfig.preset("mag-tiny")
    per_second = found["tokens_per_second"]
    assert per_second == pytest.approx(64 / found["seconds_per_step"])
    assert found["tflops"] == pytest.approx(per_second * flops_per_token(config, 32).total / 1e12)
    assert found["mfu"] is None and found["mfu_without_memory"] is None, "no peak is known for a CPU"
    assert found["activations"] == "recomputed"
    assert found["peak_bytes"] > 1e8 and found["parameters"] == TitansLM(config).num_parameters()


def test_a_row_says_what_computed() -> None:
    sizes = {"length": 8, "batch": 1, "loop": "plain", "dtype": "fp32", "activations": "kept"}
    found = train.measure(preset="mag-tiny", **sizes, **OPTIONS, attention_backend="math")
    assert (found["memory_backend"], found["attention_backend"]) == ("dual", "math")
    found = train.measure(preset="transformer-tiny", **sizes, **OPTIONS)
    assert (found["memory_backend"], found["attention_backend"]) == (None, "sdpa")
    with pytest.raises(ValueError, match="backend 'triton' does not take this memory"):
        train.measure(preset="mag-tiny", **sizes, **OPTIONS, memory_backend="triton")


@pytest.mark.parametrize("words", [[], ["--memory-backend", "dual", "--attention-backend", "math", "--compile"]])
def test_the_options_reach_the_model(words, monkeypatch) -> None:
    seen = []

    def took(model, *_) -> None:
        layers = [m for m in model.modules() if isinstance(m, AttentionLayer | MemoryCore)]
        parts = {hasattr(m.forward, "_torchdynamo_orig_callable") for m in model.modules() if isinstance(m, PARTS)}
        seen.append(({m.backend for m in layers}, parts))
        raise RuntimeError("enough")

    def run(function, cases, settings, **_) -> list:
        with pytest.raises(RuntimeError, match="enough"):
            train.measure(**cases[0], **settings)
        return []

    monkeypatch.setattr(train, "_steps", took)
    monkeypatch.setattr(train, "run_cases", run)
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    list(train.prepare(parser.parse_args(["--device", "cpu", "--loop", "plain", *words])).rows(None))
    assert seen == [({"dual", "math"}, {True}) if words else ({"auto"}, {False})]


def test_mfu_is_shown_with_and_without_inner_updates(monkeypatch) -> None:
    monkeypatch.setattr(train, "peak_flops", lambda *_: 1e12)
    found = train.measure(
        preset="lmm-tiny", length=16, batch=1, loop="plain", dtype="fp32", activations="kept", **OPTIONS
    )
    flops = flops_per_token(train.ModelConfig.preset("lmm-tiny"), 16)
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * flops.total / 1e12)
    assert found["mfu_without_memory"] / found["mfu"] == pytest.approx(flops.model / flops.total)


@pytest.mark.parametrize(("asked", "tried"), [("auto", [False, True]), ("kept", [False])])
def test_activations_are_recomputed_where_they_do_not_fit(asked, tried, monkeypatch) -> None:
    seen = []

    def run_out(preset, *, recompute, **_):
        seen.append(recompute)
        if not recompute:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {}

    monkeypatch.setattr(train, "_measure", run_out)
    sizes = {"preset": "mag-tiny", "length": 1, "batch": 1, "loop": "plain", "dtype": "bf16"}
    if asked == "auto":
        assert train.measure(**sizes, activations=asked, **OPTIONS) == {}
    else:
        with pytest.raises(torch.OutOfMemoryError):
            train.measure(**sizes, activations=asked, **OPTIONS)
    assert seen == tried


def test_a_step_has_the_asked_tokens_or_one_row() -> None:
    assert train.batch_of({"batch_tokens": 32768, "length": 4096}) == 8
    assert train.batch_of({"batch_tokens": 32768, "length": 131072}) == 1


def test_without_deepspeed_the_loop_is_plain_and_the_engine_an_error(monkeypatch, capsys) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else found(name))
    seen = []
    monkeypatch.setattr(train, "run_cases", lambda *words, **_: iter(seen.append(words[1]) or ()))
    main(["train", "--device", "cpu"])
    assert {case["loop"] for case in seen[0]} == {"plain"}
    capsys.readouterr()
    assert main(["train", "--loop", "engine", "--device", "cpu"]) == 2
    assert "--loop plain" in capsys.readouterr().err
