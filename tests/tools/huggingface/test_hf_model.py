"""Exported models in transformers: the logits of the training code, bit for bit, in every way to use them."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor

from model.generation import generate as own_generate
from tests.tools.huggingface.exported_cases import random_ids
from tools.encoding import Tokenizer
from tools.generate import main as generate_command

PAD = 3


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [n] of different lengths as a batch with its mask."""
    length = max(map(len, rows))
    ids = torch.stack([torch.cat((torch.full((length - len(row),), PAD), row)) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows])
    return ids, mask.long()


@torch.no_grad()
def test_logits_are_those_of_training_bit_for_bit(case, loaded, exported) -> None:
    model, own = loaded(case)
    folder, _ = exported(case)
    assert type(model).__module__.startswith("transformers_modules.")
    assert type(model.model).__module__.startswith("transformers_modules.")
    text = (folder / "recipe.yaml").read_text() + "memory 記憶 and a titan\n"
    tokenizer = Tokenizer.open(folder / "tokenizer.model")
    real = torch.tensor([tokenizer.encode(text)])
    assert torch.equal(model(real).logits, own(real).logits)
    ids = random_ids(3, 43)
    expected = own(ids).logits
    assert torch.equal(model(ids, return_dict=False)[0], expected)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, expected)
    assert torch.equal(model(ids, logits_to_keep=5).logits, own(ids, num_logits=5).logits)
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, expected[:, [1, 4]])


@torch.no_grad()
def test_a_token_changes_no_logit_before_it(case, loaded) -> None:
    model, _ = loaded(case)
    ids = random_ids(1, 21)
    logits = model(ids).logits
    for place in range(21):
        changed = ids.clone()
        changed[:, place] = 4 + (changed[:, place] - 3) % 300
        moved = (model(changed).logits - logits).abs().amax((0, 2))
        assert not moved[:place].any()
        assert moved[place] > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[13, 8], [4, 4, 8, 5], [7, 1, 2, 11]], ids=str)
def test_any_split_gives_what_the_same_split_gives_in_training(case, loaded, lengths) -> None:
    model, own = loaded(case)
    ids = random_ids(2, 21)
    whole, cache, state = model(ids).logits, None, None
    for start, piece in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), ids.split(lengths, 1), strict=False):
        output, expected = model(piece, past_key_values=cache), own(piece, state)
        cache, state = output.past_key_values, expected.state
        assert torch.equal(output.logits, expected.logits)
        torch.testing.assert_close(output.logits, whole[:, start : start + piece.shape[1]], rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 21
    tensors = cache.state.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in state.tensors().items())


@torch.no_grad()
def test_greedy_generation_is_that_of_training(case, loaded) -> None:
    model, own = loaded(case)
    ids = random_ids(2, 11)
    made = model.generate(ids, max_new_tokens=14, do_sample=False, eos_token_id=None)
    assert torch.equal(made[:, 11:], own_generate(own, ids, max_new_tokens=14, temperature=0))
    uncached = model.generate(ids, max_new_tokens=14, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(made, uncached)


@torch.no_grad()
def test_generation_stops_and_samples_alike_for_a_seed(loaded) -> None:
    model, _ = loaded("mac")
    ids = random_ids(1, 9)
    free = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 9:]
    stopped = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=int(free[3]))[0, 9:]
    assert stopped.tolist() == free[: free.tolist().index(int(free[3])) + 1].tolist()
    samples = []
    for _ in range(2):
        torch.manual_seed(5)
        samples.append(model.generate(ids, max_new_tokens=8, do_sample=True, num_return_sequences=3, temperature=2.0))
    assert torch.equal(*samples)
    assert samples[0].shape == (3, 17)
    assert not torch.equal(samples[0][0], samples[0][1])


def test_a_pipeline_writes_what_the_command_writes(loaded, exported, hf, capsys) -> None:
    model, _ = loaded("mac")
    folder, _ = exported("mac")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.inference_mode():
        made = hf.pipeline("text-generation", model=model, tokenizer=tokenizer)(
            "memory ti", max_new_tokens=12, do_sample=False, return_tensors=True
        )
    command = [str(folder), "--prompt", "memory ti", "--max-new-tokens", "12", "--temperature", "0"]
    assert generate_command(command) == 0
    text = Tokenizer.open(folder / "tokenizer.model").decode(made[0]["generated_token_ids"])
    assert capsys.readouterr().out == text + "\n"


def log_probability(model, ids: Tensor, start: int) -> float:
    """Of the tokens from `start` on."""
    scores = model(ids[None]).logits[0].log_softmax(-1)
    return float(scores[start - 1 : -1].gather(1, ids[start:, None]).sum())


@torch.no_grad()
def test_beams_carry_their_own_states(case, loaded) -> None:
    model, own = loaded(case)
    ids = random_ids(2, 6)
    options = {"max_new_tokens": 7, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    beams = model.generate(ids, num_return_sequences=3, return_dict_in_generate=True, output_scores=True, **options)
    assert torch.equal(beams.sequences, model.generate(ids, num_return_sequences=3, use_cache=False, **options))
    # Beams are scored by what the training code gives them: a state that went to another beam would not be.
    for sequence, score in zip(beams.sequences, beams.sequences_scores, strict=True):
        assert log_probability(own, sequence, 6) / 7 == pytest.approx(float(score), abs=1e-4)


@torch.no_grad()
def test_padding_on_the_left_leaves_no_trace(case, loaded) -> None:
    model, own = loaded(case)
    rows = [random_ids(1, length, seed=length)[0] for length in (5, 11, 11, 2)]
    ids, mask = left_padded(rows)
    output = model(ids, attention_mask=mask)
    for index, row in enumerate(rows):
        alone = own(row[None]).logits[0]
        found = output.logits[index, len(mask[0]) - len(row) :]
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
        if index in (0, 3):  # computed alone
            assert torch.equal(found, alone)
        assert not output.logits[index, : len(mask[0]) - len(row)].any()
    other = ids.masked_fill(mask == 0, 77)
    assert torch.equal(model(other, attention_mask=mask).logits, output.logits)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)
    for index, row in enumerate(rows):
        expected = own_generate(own, row[None], max_new_tokens=9, temperature=0)[0]
        assert torch.equal(made[index, len(mask[0]) :], expected)


@torch.no_grad()
def test_padding_freezes_a_state_wherever_it_stands(loaded) -> None:
    model, own = loaded("mac")
    row = random_ids(1, 9)
    cache = model(row[:, :5]).past_key_values
    before = cache.state.tensors()
    mask = torch.cat((torch.ones(1, 5), torch.zeros(1, 3)), 1)
    frozen = model(torch.full((1, 3), PAD), attention_mask=mask, past_key_values=cache)
    assert not frozen.logits.any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in cache.state.tensors().items())
    assert cache.get_seq_length() == 8
    rest = model(row[:, 5:], past_key_values=cache).logits
    assert torch.equal(rest, own(row[:, 5:], own(row[:, :5]).state).logits)
    # On the right the logits stay those of the last token, from which generation goes on.
    ids = torch.cat((row, torch.full((1, 4), PAD)), 1)
    padded = model(ids, attention_mask=torch.cat((torch.ones(1, 9), torch.zeros(1, 4)), 1))
    assert torch.equal(padded.logits[:, 9:], padded.logits[:, 8:9].expand(1, 4, -1))
    assert torch.equal(padded.logits[:, :9], own(row).logits)


@torch.no_grad()
def test_generation_goes_on_from_a_cache(case, loaded) -> None:
    model, _ = loaded(case)
    ids = random_ids(1, 10)
    options = {"do_sample": False, "eos_token_id": None}
    whole = model.generate(ids, max_new_tokens=12, **options)
    first = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **options)
    assert first.past_key_values.get_seq_length() == 14
    kept = copy.deepcopy(first.past_key_values)
    for cache in (first.past_key_values, kept):  # a copy of it serves as well, once it was used
        assert torch.equal(model.generate(first.sequences, past_key_values=cache, max_new_tokens=7, **options), whole)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_prompt_may_be_read_in_chunks(loaded, chunk) -> None:
    model, own = loaded("mag")
    rows = [random_ids(1, length, seed=length)[0] for length in (5, 11)]
    ids, mask = left_padded(rows)
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, prefill_chunk_size=chunk
    )
    for index, row in enumerate(rows):
        assert torch.equal(made[index, 11:], own_generate(own, row[None], max_new_tokens=6, temperature=0)[0])


@torch.no_grad()
@pytest.mark.parametrize("case", ["mac", "mag", "mal", "lmm", "transformer-window"])
def test_a_long_prompt_is_read_in_pieces_and_leaves_a_state_of_the_same_size(loaded, case, monkeypatch) -> None:
    model, own = loaded(case)
    piece, seen = 16, []
    monkeypatch.setattr("model.generation.PREFILL_TOKENS", piece)
    monkeypatch.setattr(
        sys.modules[type(model).__module__.replace("modeling_titans", "titans_cache")], "PREFILL_TOKENS", piece
    )
    forward = type(model.model).forward

    def watched(self, tokens, *arguments, **options):
        seen.append(tokens.shape[1])
        return forward(self, tokens, *arguments, **options)

    monkeypatch.setattr(type(model.model), "forward", watched)
    sizes = []
    for length in (2 * piece, 5 * piece + 8):
        ids = random_ids(1, length)
        output = model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
        expected = own_generate(own, ids, max_new_tokens=2, temperature=0)
        assert torch.equal(output.sequences[:, length:], expected)
        state = model(ids, logits_to_keep=1).past_key_values.state
        sizes.append(sum(tensor.numel() for tensor in state.tensors().values()))
    assert max(seen) == piece
    assert sizes[0] == sizes[1]


def test_a_loss_has_the_gradients_of_training(case, loaded) -> None:
    model, own = loaded(case)
    ids = random_ids(2, 14)
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    assert output.past_key_values is None
    output.loss.backward()
    targets = torch.cat((labels[:, 1:], torch.full((2, 1), -100)), 1)
    expected = own(ids, targets=targets)
    (expected.loss_sum / (targets != -100).sum()).backward()
    torch.testing.assert_close(output.loss, expected.loss_sum / (targets != -100).sum())
    for (name, found), wanted in zip(model.model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(
            found.grad, wanted.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text
        )
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    own.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    model(ids, labels=labels).loss.backward()
    model.gradient_checkpointing_disable()
    model.eval()
    for parameter, wanted in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, wanted)
    model.zero_grad()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 4, 16)}, "no inputs_embeds"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \[1, 3\]"),
        ({"attention_mask": torch.full((1, 4), 2)}, "values other than 0 and 1"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask is"),
        ({"output_hidden_states": True}, "output_hidden_states"),
    ],
)
def test_what_does_not_fit_is_named(loaded, options, message) -> None:
    model, _ = loaded("lmm")
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 4), **options)


@torch.no_grad()
def test_a_cache_that_does_not_fit_is_refused(loaded, hf) -> None:
    model, _ = loaded("mag")
    cache = model(random_ids(2, 5)).past_key_values
    with pytest.raises(ValueError, match="has 2 rows, input_ids 3"):
        model(random_ids(3, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="can't forget its last tokens"):
        cache.crop(3)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert model(random_ids(3, 5), past_key_values=cache).logits.shape[0] == 3
    with pytest.raises(ValueError, match="DynamicCache"):
        used = hf.DynamicCache()
        used.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), 0)
        model(random_ids(1, 5), past_key_values=used)
    with pytest.raises(ValueError, match="StaticCache"):
        model.generate(random_ids(1, 5), max_new_tokens=3, do_sample=False, cache_implementation="static")
    with pytest.raises(ValueError, match="checkpoints every layer"):
        model._set_gradient_checkpointing(every_n_layers=2)
    with pytest.raises(ValueError, match="hidden_size is 5"):
        type(model.config)(titans=model.config.titans, hidden_size=5)
