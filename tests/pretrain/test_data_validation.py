"""The validation reader: every token is scored exactly once, on any number of ranks."""

import numpy as np
import pytest
import torch

from pretrain.data import sequential_batches
from pretrain.errors import UserError
from tests.data_cases import documents, make_shards, make_tokenizer


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder, make_tokenizer(folder), documents(12, words=30))


def stream(shards):
    return np.concatenate([shards.read(number) for number in range(shards.documents)]).astype(np.int64)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("length", "batch_size"), [(16, 4), (7, 1), (1, 50), (5000, 2)])
@pytest.mark.parametrize("max_tokens", [None, 1, 100, 10**9])
def test_every_token_is_scored_once_with_the_one_before_it(shards, world_size, length, batch_size, max_tokens):
    options = {"sequence_length": length, "batch_size": batch_size, "max_tokens": max_tokens, "world_size": world_size}
    ranks = [list(sequential_batches(shards, rank=rank, **options)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [
        row
        for step in zip(*ranks, strict=True)
        for batch in step
        for row in zip(batch.tokens, batch.targets, strict=True)
    ]
    tokens, targets = (torch.stack(part).flatten() for part in zip(*rows, strict=True))
    expected = torch.from_numpy(stream(shards))[:max_tokens]
    scored = targets != -100
    assert torch.equal(targets[scored], expected)
    # EOS stands before the first document, as it does before every other one.
    inputs = torch.cat([torch.tensor([shards.tokenizer.eos_id]), expected[:-1]])
    assert torch.equal(tokens[scored], inputs)
    assert bool((tokens[~scored] == shards.tokenizer.eos_id).all())
    assert tokens.dtype == targets.dtype == torch.int64


def test_the_scored_tokens_stand_for_the_whole_text(shards):
    batches = sequential_batches(shards, sequence_length=32, batch_size=4)
    targets = torch.cat([batch.targets[batch.targets != -100] for batch in batches])
    assert int(shards.token_bytes[targets.numpy()].sum()) == shards.text_bytes


@pytest.mark.parametrize("name", ["sequence_length", "batch_size", "max_tokens", "world_size"])
def test_impossible_sizes_are_named_at_the_call(shards, name):
    options = {"sequence_length": 8, "batch_size": 2, "max_tokens": 10, "world_size": 1} | {name: 0}
    with pytest.raises(UserError, match=f"{name} 0: must be at least 1"):
        sequential_batches(shards, **options)
    with pytest.raises(UserError, match="rank 1"):
        sequential_batches(shards, sequence_length=8, batch_size=2, rank=1)
