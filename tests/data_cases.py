"""Small texts, tokenizers and shard sets for the tests of data."""

import json
import random
from pathlib import Path

from pretrain.data import ShardSet
from tools.documents import DocumentReader
from tools.shards.build import build
from tools.tokenizer import train

SYLLABLES = "me mo ry ti tan ga te wri re ad stre am to ken sha der or dis po sur pri se lä 記 憶 🜁 _ (x".split()
AWKWARD = (
    "",
    " ",
    "\n",
    "  two  spaces\t\ttabs\r\nand a return ",
    "a\u2581b \u2581\u2581 c",
    "\x00\x01\x7f",
    "\ufeffbyte order mark",
    "e\u0301 \u00e9 ﬁ ﷺ 🚀🏽 \ud7ff",
    "<s></s><unk><pad><0x41> are text here",
    "1234567890 3.14",
    "x" * 7000,
    " " * 7000,
    "\u2581" * 50,
    "日本語" * 2500,
    "def f(x):\n    return {'a': [x]}\n\n\n",
)


def sentences(generator: random.Random, words: int) -> str:
    """Random text with lines, indentation and numbers."""
    ends = [" ", " ", " ", ", ", ". ", ".\n", ":\n    ", "\n\n", " 42 "]
    return "".join(
        "".join(generator.choices(SYLLABLES, k=generator.randint(1, 3))) + generator.choice(ends) for _ in range(words)
    )


def documents(number: int, seed: int = 0, words: int = 60) -> list[str]:
    """`number` different texts of 1 to 2 * words words."""
    generator = random.Random(seed)
    return [sentences(generator, generator.randint(1, 2 * words)) for _ in range(number)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    """Writes a record for each text."""
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def make_tokenizer(folder: Path, vocab_size: int = 400) -> Path:
    """A tokenizer of the random texts, as a file in `folder`."""
    path = folder / "tokenizer.model"
    path.write_bytes(
        train(DocumentReader([write_jsonl(folder / "tokenizer.jsonl", documents(60, seed=9))]), vocab_size)
    )
    return path


def make_shards(folder: Path, tokenizer: Path, texts: list[str], shard_tokens: int = 2000) -> ShardSet:
    """A shard set of the texts, all in training; open."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = DocumentReader([write_jsonl(folder / "input.jsonl", texts)])
    build(reader, tokenizer, folder / "shards", shard_tokens=shard_tokens, validation_fraction=0.0)
    return ShardSet.open(folder / "shards" / "train")
