"""The tokenizer: lossless, deterministic, exact in pieces, and clear about what is wrong."""

import random

import numpy as np
import pytest
import sentencepiece

from pretrain.errors import UserError
from tests.data_cases import AWKWARD, documents, make_tokenizer, sentences, write_jsonl
from tools.encoding import Tokenizer
from tools.tokenizer import TRAINER_OPTIONS, main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 600)


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer.open(model)


@pytest.fixture(scope="module")
def prefix_tokenizer(tmp_path_factory):
    """A tokenizer as Llama's and Mistral's are: with a dummy prefix."""
    prefix = tmp_path_factory.mktemp("prefix") / "prefix"
    options = TRAINER_OPTIONS | {"add_dummy_prefix": True, "pad_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(60, seed=9)), model_prefix=str(prefix), vocab_size=500, **options
    )
    return Tokenizer.open(prefix.with_suffix(".model"))


@pytest.mark.parametrize("name", ["tokenizer", "prefix_tokenizer"])
def test_every_text_comes_back(name, request):
    tokenizer = request.getfixturevalue(name)
    generator = random.Random(1)
    anything = ["".join(chr(generator.choice([32, 10, 0x2581, generator.randrange(1, 0xD800)])) for _ in range(300))]
    for text in [*AWKWARD, *documents(20), *anything]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["tokenizer", "prefix_tokenizer"])
def test_encoding_in_pieces_equals_one_call_of_sentencepiece(name, request):
    tokenizer = request.getfixturevalue(name)
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    texts = [sentences(random.Random(seed), 4000) for seed in range(4)]
    texts += [text.replace("\u2581", "") for text in AWKWARD]
    assert tokenizer.encode_documents(texts) == [whole.encode(text) for text in texts]


def test_control_tokens_are_never_made_from_text(tokenizer):
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert min(min(tokenizer.encode(text), default=9) for text in AWKWARD) > 3


def test_token_bytes_sum_to_the_text(tokenizer):
    lengths = tokenizer.token_bytes()
    assert lengths[[0, 1, 2, 3]].sum() == 0
    for text in [*AWKWARD, *documents(20)]:
        assert int(lengths[np.array(tokenizer.encode(text), np.int64)].sum()) == len(text.encode())


def test_newlines_and_indentation_have_pieces(tokenizer):
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    assert any("\n" in piece and len(piece) > 1 for piece in pieces)
    assert "\u2581" * 4 in pieces


def test_training_twice_gives_the_same_file(tmp_path, model):
    (tmp_path / "again").mkdir()
    assert make_tokenizer(tmp_path / "again", 600).read_bytes() == model.read_bytes()


def test_train_command_writes_and_does_not_replace(tmp_path, capsys):
    text = write_jsonl(tmp_path / "a.jsonl", documents(40))
    command = ["train", "--input", str(text), "--vocab-size", "400", "--output", str(tmp_path / "new" / "t.model")]
    assert main(command) == 0
    assert "400 tokens" in capsys.readouterr().out
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.model"]


def test_limit_bytes_is_said(tmp_path, capsys):
    text = write_jsonl(tmp_path / "a.jsonl", documents(40))
    output = str(tmp_path / "t.model")
    assert (
        main(["train", "--input", str(text), "--vocab-size", "350", "--output", output, "--limit-bytes", "6000"]) == 0
    )
    assert "--limit-bytes" in capsys.readouterr().err


def test_too_large_vocabulary_names_the_largest_which_works(tmp_path, capsys):
    text = write_jsonl(tmp_path / "a.jsonl", documents(5))
    output = str(tmp_path / "t.model")
    assert main(["train", "--input", str(text), "--vocab-size", "60000", "--output", output]) == 2
    message = capsys.readouterr().err
    largest = message.split("at most ")[1].split()[0]
    assert "60000" in message
    assert main(["train", "--input", str(text), "--vocab-size", largest, "--output", output]) == 0


def test_too_small_vocabulary_names_the_smallest(tmp_path, capsys):
    text = write_jsonl(tmp_path / "a.jsonl", documents(5))
    output = str(tmp_path / "t.model")
    assert main(["train", "--input", str(text), "--vocab-size", "100", "--output", output]) == 2
    smallest = capsys.readouterr().err.split("at least ")[1].strip()
    assert main(["train", "--input", str(text), "--vocab-size", smallest, "--output", output]) == 0


@pytest.mark.parametrize("texts", [[], ["", "  \n "], ["\x00\u2581"]])
def test_empty_corpus_is_an_error(tmp_path, capsys, texts):
    text = write_jsonl(tmp_path / "a.jsonl", texts)
    assert main(["train", "--input", str(text), "--vocab-size", "400", "--output", str(tmp_path / "t.model")]) == 2
    assert "a.jsonl: no text" in capsys.readouterr().err


def test_wrong_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match="missing.model: cannot be read"):
        Tokenizer.open(tmp_path / "missing.model")
    for content in (b"", b"not a model", bytes(range(256))):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match=r"bad.model: (is not a SentencePiece|would change)"):
            Tokenizer.open(tmp_path / "bad.model")


def test_lossy_tokenizer_is_refused_with_the_reason(tmp_path):
    prefix = tmp_path / "lossy"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(60)), model_prefix=str(prefix), vocab_size=100, model_type="bpe", minloglevel=2
    )
    with pytest.raises(UserError, match=r"nmt_nfkc.*remove_extra_whitespaces.*no byte fallback"):
        Tokenizer.open(prefix.with_suffix(".model"))


def test_encode_and_decode_commands(model, capsys):
    assert main(["encode", str(model), " the memory\n"]) == 0
    tokens = capsys.readouterr().out.split()
    assert main(["decode", str(model), *tokens]) == 0
    assert capsys.readouterr().out == " the memory\n\n"
    assert main(["encode", "--pieces", str(model), "the"]) == 0
    assert "'" in capsys.readouterr().out
    assert main(["decode", str(model), "600"]) == 2
    assert "has 600" in capsys.readouterr().err
    assert main(["inspect", str(model)]) == 0
    assert "0, 1, 2, 3" in capsys.readouterr().out
