"""Generation as a benchmark: a made state is as large as a read one; models stand beside a transformer."""

from __future__ import annotations

import argparse

import pytest
import torch

from tests.model_cases import build_model
from tools.bench import decode

CASES = ["mac", "mag", "mal", "lmm", "transformer", "transformer-window"]


def shapes(state) -> dict[str, tuple[torch.dtype, list[int]]]:
    return {name: (tensor.dtype, list(tensor.shape)) for name, tensor in state.named_tensors()}


@pytest.mark.parametrize("context", [5, 24, 41, 61])
@pytest.mark.parametrize("case", CASES)
def test_a_made_state_has_the_shapes_of_a_read_one(case, context) -> None:
    model = build_model(case, torch.float32)
    read, made = (decode.behind(model, 2, context, whole) for whole in (True, False))
    assert shapes(made) == shapes(read)
    assert made.position.tolist() == read.position.tolist() == [context] * 2


def test_making_a_state_does_not_read_the_context(monkeypatch) -> None:
    model = build_model("transformer", torch.float32)
    tokens = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda piece, state: tokens.append(piece.shape[1]) or forward(piece, state))
    decode.behind(model, 1, 5000, False)
    assert sum(tokens) < 100


def test_a_row_says_speed_and_bytes() -> None:
    options = {"tokens": 2, "device": "cpu", "dtype": "fp32", "threads": 1, "repeats": 1}
    read = decode.measure(preset="transformer-tiny", context=64, batch=2, state="read", **options)
    # Keys and values of 2 layers, 4 heads of 32, in fp32.
    per_token = 2 * 2 * 4 * 32 * 4
    assert read["state_bytes_per_token"] == pytest.approx(per_token, rel=0.02)
    assert read["state_bytes_per_row"] == pytest.approx(64 * read["state_bytes_per_token"])
    assert read["tokens_per_second"] == pytest.approx(2 / read["seconds_per_token"])
    assert read["prefill_tokens_per_second"] > 0 and read["least_seconds_per_token"] is None
    made = decode.measure(preset="transformer-tiny", context=64, batch=2, state="made", **options)
    assert made["state_bytes_per_row"] == read["state_bytes_per_row"]
    assert made["prefill_tokens_per_second"] is None


def test_the_backends_reach_the_model() -> None:
    options = {"tokens": 1, "device": "cpu", "dtype": "fp32", "threads": 1, "repeats": 1, "state": "made"}
    sizes = {"preset": "mag-tiny", "context": 8, "batch": 1}
    for name, said in (("memory_backend", "triton"), ("attention_backend", "varlen")):
        with pytest.raises(ValueError, match=f"backend '{said}' does not take"):
            decode.measure(**sizes, **options, **{name: said})
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    asked = parser.parse_args(["--device", "cpu", "--memory-backend", "dual", "--attention-backend", "math"])
    settings = decode.prepare(asked).settings
    assert (settings["memory_backend"], settings["attention_backend"]) == ("dual", "math")


def test_models_stand_beside_the_transformer_of_their_size() -> None:
    def row(preset, speed, held, context=10):
        numbers = {"tokens_per_second": speed, "state_bytes_per_row": held}
        return {"preset": preset, "context": context, "batch": 1, **numbers}

    rows = decode.beside_transformer([
        row("mag-340m", 30.0, 10.0),
        row("transformer-340m", 10.0, 100.0),
        row("mag-760m", 30.0, 10.0),
        {"preset": "mac-340m", "context": 10, "batch": 1, "outcome": "failed", "why": "?"},
    ])  # fmt: skip
    assert (rows[0]["speed_over_transformer"], rows[0]["state_over_transformer"]) == (3.0, 0.1)
    assert rows[1]["speed_over_transformer"] == 1.0
    assert "speed_over_transformer" not in rows[2] and "speed_over_transformer" not in rows[3]
