"""Influence in a model that recalls: the answer owes itself to the pair that holds it, and to no other."""

from __future__ import annotations

import math

import pytest
import torch

from model import ModelConfig, TitansLM
from tools.inspect.influence import answer_likelihoods

NUM = 8
"""Keys, tokens 0 to 7; as many values, tokens 8 to 15; then a token of filler."""
FILLER = 2 * NUM


def recalling_model(depth: int) -> TitansLM:
    """An LMM whose weights are set by hand: at a value it writes that value under the key before it, and at a key it
    reads what lies under it, which the head turns into the value's logit.
    """
    memory = {"depth": depth, "chunk": 4}
    sizes = {"vocab_size": FILLER + 1, "dim": FILLER + 1, "num_layers": 1, "num_heads": 1, "ffn_dim": 4}
    torch.manual_seed(0)
    config = {**sizes, "variant": "lmm", "tie_embeddings": False, "memory": memory}
    model = TitansLM(ModelConfig.model_validate(config)).double().eval()
    one = torch.eye(FILLER + 1).double()
    keys = torch.arange(FILLER + 1) < NUM
    values = ~keys & (torch.arange(FILLER + 1) < FILLER)
    layer = model.blocks[0].mixer.memory
    with torch.no_grad():
        model.embedding.weight.copy_(one)
        for stream, tokens, lag in ((layer.q, keys, 0), (layer.k, keys, 1), (layer.v, values, 0)):
            stream.project.weight.copy_(one * tokens[:, None])
            stream.convolution.weight.zero_()
            stream.convolution.weight[-1 - lag] = 1
        layer.output.gate.weight.zero_()
        layer.output.project.weight.copy_(2 * one)
        model.blocks[0].feed_forward.down.weight.zero_()
        model.head.weight.copy_(2 * one * values[:, None])
    return model


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
def test_the_pair_that_holds_the_answer_has_nearly_all_the_influence(depth: int) -> None:
    model = recalling_model(depth)
    draw = torch.Generator().manual_seed(1)
    pairs = torch.stack((torch.randperm(NUM, generator=draw), NUM + torch.randperm(NUM, generator=draw)), 1)
    spans = [range(2 * index, 2 * index + 2) for index in range(NUM)]
    for index, (key, value) in enumerate(pairs.tolist()):
        tokens = [*pairs.flatten().tolist(), *[FILLER] * 10, key, value]
        assert int(model(torch.tensor([tokens[:-1]])).logits[0, -1].argmax()) == value
        answer = range(len(tokens) - 1, len(tokens))
        parts = answer_likelihoods(model, tokens, answer, [range(0), *spans], batch_size=4)
        whole, *without = [nats for part in parts for nats in part]
        influences = [whole - nats for nats in without]
        others = [abs(nats) for number, nats in enumerate(influences) if number != index]
        assert influences[index] > 1
        assert influences[index] > 3 * max(others)
        if depth == 1:  # unit keys that are orthogonal share nothing: without the pair all tokens are as likely
            assert without[index] == pytest.approx(-math.log(FILLER + 1), abs=1e-6)
            assert max(others) < 1e-6
