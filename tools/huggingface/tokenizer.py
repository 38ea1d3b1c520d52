"""A SentencePiece model as transformers' tokenizer.json, with the tokens of `tools.encoding`.

Byte-pair encoding by SentencePiece merges the two neighbours whose union is the piece of the best score, the leftmost
first; tokenizer.json lists pairs in the order in which they merge. So every way to put a piece together from two others
is listed, pieces by falling score. A space is itself in this vocabulary, and not U+2581 as SentencePiece spells it:
thus a U+2581 in a text is no piece, and becomes its three bytes, as in `tools.encoding`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as model_format

from tools.encoding import SPACE_SYMBOL, Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json")
UNBOUNDED = 10**9
"""Tokens of the longest text: a memory has no limit, and transformers wants a number."""

_Type = model_format.ModelProto.SentencePiece


def refusal(path: Path) -> str | None:
    """Why a tokenizer can't be converted exactly; None if it can."""
    model = _read(path)
    if model.trainer_spec.model_type != model_format.TrainerSpec.BPE:
        return "it is not a byte-pair encoding"
    if model.trainer_spec.eos_id < 0:
        return "it has no EOS"
    if any(piece.type == _Type.USER_DEFINED for piece in model.pieces):
        return "it has user-defined pieces, which are cut out of a text before anything else"
    return None


def tokenizer_files(path: Path, max_tokens: int = UNBOUNDED) -> dict[str, str]:
    """Content of `FILES` by name, for the SentencePiece model at `path`, for which `refusal` is None.

    Called with special tokens, the tokenizer puts EOS before a text: documents end with it, so that is what a text
    begins after. It is therefore BOS, too. Control tokens that are written out in a text are text.

    Args:
        max_tokens: above which transformers warns.
    """
    own, model = Tokenizer.open(path), _read(path)
    spellings = [piece.piece.replace(SPACE_SYMBOL, " ") if _is_text(piece) else piece.piece for piece in model.pieces]
    control = [index for index, piece in enumerate(model.pieces) if piece.type in (_Type.CONTROL, _Type.UNKNOWN)]
    eos, unknown = spellings[own.eos_id], spellings[own.unk_id]
    prefix = model.normalizer_spec.add_dummy_prefix
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(index, spellings[index]) for index in control],
        "normalizer": {"type": "Prepend", "prepend": " "} if prefix else None,
        "pre_tokenizer": None,
        "post_processor": _begins_with(eos, own.eos_id),
        "decoder": _decoder(prefix),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {spelling: index for index, spelling in enumerate(spellings)},
            "merges": _merges(model, spellings),
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "unk_token": unknown,
        "pad_token": eos if own.pad_id is None else spellings[own.pad_id],
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    texts = (json.dumps(content, ensure_ascii=False), json.dumps(settings, indent=1, ensure_ascii=False))
    return {name: text + "\n" for name, text in zip(FILES, texts, strict=True)}


def _read(path: Path) -> Any:
    model = model_format.ModelProto()
    model.ParseFromString(path.read_bytes())
    return model


def _is_text(piece: Any) -> bool:
    return piece.type == _Type.NORMAL


def _merges(model: Any, spellings: list[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that make a piece, in the order in which they merge."""
    text = {spelling: index for index, spelling in enumerate(spellings) if _is_text(model.pieces[index])}
    order = sorted(text.values(), key=lambda index: (-model.pieces[index].score, index))
    return [
        (whole[:cut], whole[cut:])
        for whole in (spellings[index] for index in order)
        for cut in range(1, len(whole))
        if whole[:cut] in text and whole[cut:] in text
    ]


def _added_token(index: int, spelling: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": spelling, **flags}


def _begins_with(spelling: str, index: int) -> dict[str, Any]:
    """A post-processor that puts a token before every text."""

    def parts(name: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": spelling, "type_id": type_id}},
            {"Sequence": {"id": name, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": parts("A", 0),
        "pair": [*parts("A", 0), *parts("B", 1)],
        "special_tokens": {spelling: {"id": spelling, "ids": [index], "tokens": [spelling]}},
    }


def _decoder(prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
