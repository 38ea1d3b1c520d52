"""Text to tokens and back with a SentencePiece model, losslessly.

SentencePiece spells a space as U+2581, so a U+2581 in the text itself would come back as a space. It is encoded as
its three byte pieces instead, which decode to it.

A document's tokens are those of the whole document, whatever its length. They are computed in pieces, which is about
2.5 times as fast on long documents: byte-pair encoding merges neighbours only into a piece of the vocabulary, so
where two characters stand side by side in no piece of it, no merge crosses, and cutting there changes no token.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as model_format

from pretrain.durable import file_sha256
from pretrain.errors import UserError

SPACE_SYMBOL = "\u2581"
PIECE_CHARACTERS = 2000


class Tokenizer:
    """A SentencePiece model; open with `Tokenizer.open`."""

    def __init__(self, path: Path, proto: model_format.ModelProto) -> None:
        # The model's dummy prefix, a space before every text, would come before every piece: it is added here instead.
        self._prefix = " " if proto.normalizer_spec.add_dummy_prefix else ""
        proto.normalizer_spec.add_dummy_prefix = False
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.path = path
        self.sha256 = file_sha256(path)
        self.vocab_size: int = processor.vocab_size()
        self.unk_id = _id_or_none(processor.unk_id())
        self.bos_id = _id_or_none(processor.bos_id())
        self.eos_id = _id_or_none(processor.eos_id())
        self.pad_id = _id_or_none(processor.pad_id())
        self._processor = processor
        self._is_bpe = proto.trainer_spec.model_type == model_format.TrainerSpec.BPE
        self._joined = self._joined_characters()
        self._space_symbol_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]

    @classmethod
    def open(cls, path: str | Path) -> "Tokenizer":
        """Opens a .model file; raises UserError when it is missing, damaged, or would lose text."""
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; give a SentencePiece model") from None
        proto = model_format.ModelProto()
        try:
            proto.ParseFromString(data)
            sentencepiece.SentencePieceProcessor(model_proto=data)
        except (DecodeError, RuntimeError) as error:
            raise UserError(f"{path}: is not a SentencePiece model: {error}") from None
        normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
        lossy = {
            f"normalization {normalizer.name!r}": normalizer.name != "identity",
            "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
            "whitespace as suffix": trainer.treat_whitespace_as_suffix,
            "no byte fallback": not trainer.byte_fallback,
        }
        if any(lossy.values()):
            found = ", ".join(name for name, present in lossy.items() if present)
            raise UserError(
                f"{path}: would change text ({found}); make a tokenizer with `python -m tools.tokenizer train`"
            )
        return cls(path, proto)

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """The tokens of a text, without BOS and EOS. `begins` as in `encode_documents`."""
        return self.encode_documents([text], begins=begins)[0]

    def encode_documents(self, texts: Sequence[str], *, threads: int = -1, begins: bool = True) -> list[list[int]]:
        """The tokens of each text, without BOS and EOS; one call for many is faster.

        Args:
            threads: -1 for all cores.
            begins: whether texts begin here; False behind other text, where the tokenizer adds no space of its own.
        """
        prefix = self._prefix if begins else ""
        pieces = [self._pieces(prefix + text) if text else [] for text in texts]
        runs = [piece for group in pieces for piece in group if piece != SPACE_SYMBOL]
        encoded = iter(self._processor.encode(runs, num_threads=threads))
        return [
            [token for piece in group for token in (self._space_symbol_ids if piece == SPACE_SYMBOL else next(encoded))]
            for group in pieces
        ]

    def decode(self, tokens: Sequence[int], *, begins: bool = True) -> str:
        """The text of tokens; BOS, EOS and padding have none, bytes that are not UTF-8 become U+FFFD.

        Args:
            begins: whether a text begins here; False behind other text, where a space is one of the text's own.

        Raises UserError for a token outside the vocabulary.
        """
        tokens = [int(token) for token in tokens]
        if tokens and not (0 <= min(tokens) and max(tokens) < self.vocab_size):
            raise UserError(f"tokens {min(tokens)}..{max(tokens)}: the vocabulary of {self.path} has {self.vocab_size}")
        text: str = self._processor.decode(tokens)
        return text.removeprefix(self._prefix) if begins else text

    def token_bytes(self) -> np.ndarray:
        """uint16 [vocab_size]: the UTF-8 bytes that each token stands for, 0 for control tokens."""
        return np.array([self._text_bytes(token) for token in range(self.vocab_size)], np.uint16)

    def begins_character(self, token: int) -> bool:
        """Whether a token is the first byte of a character of several."""
        return self._processor.is_byte(token) and int(self.piece(token)[1:-1], 16) >= 0xC0

    def piece(self, token: int) -> str:
        """The spelling of a token in the vocabulary, with U+2581 for a space."""
        return self._processor.id_to_piece(token)

    def _text_bytes(self, token: int) -> int:
        if self._processor.is_byte(token):
            return 1
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return 0
        return len(self.piece(token).replace(SPACE_SYMBOL, " ").encode())

    def _joined_characters(self) -> frozenset[str]:
        """Every pair of characters that stand side by side in a piece: text is never cut between them."""
        return frozenset(
            piece[at : at + 2]
            for token in range(self.vocab_size)
            if self._text_bytes(token)
            for piece in [self.piece(token).replace(SPACE_SYMBOL, " ")]
            for at in range(len(piece) - 1)
        )

    def _pieces(self, text: str) -> list[str]:
        """The text cut where no token changes; each U+2581 is a piece of its own."""
        parts: list[str] = []
        for number, run in enumerate(text.split(SPACE_SYMBOL)):
            parts += [SPACE_SYMBOL] if number else []
            start = 0
            while self._is_bpe and len(run) - start > PIECE_CHARACTERS:
                end = start + PIECE_CHARACTERS
                while end < len(run) and run[end - 1 : end + 1] in self._joined:
                    end += 1
                parts.append(run[start:end])
                start = end
            parts.append(run[start:])
        return parts


def _id_or_none(token: int) -> int | None:
    return token if token >= 0 else None
