"""The baseline of the demo is a proper, well-smoothed bigram model."""

from types import SimpleNamespace

import numpy as np
import pytest

from pretrain.errors import UserError
from tools.demo.bigram import Bigram, Smoothing, bits_per_byte, fit_bigram

VOCABULARY = 7


def shard_set(documents: list[list[int]], text_bytes: int = 100) -> SimpleNamespace:
    """As much of a ShardSet as the baseline reads; EOS is 0."""
    return SimpleNamespace(
        folder="shards",
        documents=len(documents),
        text_bytes=text_bytes,
        tokenizer=SimpleNamespace(vocab_size=VOCABULARY, eos_id=0),
        read=lambda document: np.array(documents[document], np.uint16),
    )


@pytest.mark.parametrize("base", ["share", "continuation"])
def test_probabilities_of_every_context_sum_to_one(base):
    stream = np.random.default_rng(0).integers(0, VOCABULARY - 1, 40)  # the last token is never seen
    model = Bigram(stream, VOCABULARY, Smoothing(0.75, base))
    before, after = np.meshgrid(np.arange(VOCABULARY), np.arange(VOCABULARY), indexing="ij")
    probabilities = model.probabilities(before, after)
    assert np.allclose(probabilities.sum(axis=1), 1.0, rtol=1e-12)
    assert (probabilities > 0).all()


def test_discounting_follows_the_formula():
    # Pairs 1->2 twice, 2->1 once, 1->3 once; c(1) = 3, two different followers.
    model = Bigram(np.array([1, 2, 1, 2, 1, 3]), 4, Smoothing(0.5, "share"))
    share = (np.array([0, 2, 2, 1]) + 0.5) / 7
    expected = (2 - 0.5) / 3 + 0.5 * 2 / 3 * share[2]
    assert model.probabilities(np.array([1]), np.array([2]))[0] == pytest.approx(expected, rel=1e-12)


def test_bits_are_those_of_the_stream_and_count_each_token_once():
    model = Bigram(np.array([0, 1, 2, 0, 1, 2, 0]), VOCABULARY, Smoothing(0.5, "share"))
    stream = np.array([0, 1, 2, 0])
    one_by_one = sum(model.bits(stream[i : i + 2]) for i in range(3))
    assert model.bits(stream) == pytest.approx(one_by_one, rel=1e-12)


def test_a_predictable_language_costs_little_and_noise_costs_its_entropy():
    documents = [[1, 2, 3, 4, 5, 0]] * 200
    held_out = shard_set(documents[:2], text_bytes=12)
    assert bits_per_byte(fit_bigram(shard_set(documents)), held_out) < 0.05
    noise = np.random.default_rng(0)
    train = shard_set([noise.integers(1, VOCABULARY, 50).tolist() for _ in range(200)])
    held_out = shard_set([noise.integers(1, VOCABULARY, 50).tolist() for _ in range(50)], text_bytes=2500)
    assert bits_per_byte(fit_bigram(train), held_out) == pytest.approx(np.log2(VOCABULARY - 1), rel=0.02)


def test_one_document_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        fit_bigram(shard_set([[1, 0]]))
