"""The vocabulary of a SentencePiece model: one that we trained, or an existing one as it is."""

from collections.abc import Sequence
from typing import Any

import sentencepiece

from dist_lm.errors import ArtefactError
from dist_lm.tokenizer.symbols import NEVER_TEXT, SPACE, SPECIAL_TOKENS

CONTROL, USER_DEFINED = 3, 4  # ModelProto.SentencePiece.Type


class SentencePieceModel:
    """A model of `train_tokenizer`, or an existing one.

    An existing model encodes as SentencePiece does, with one difference: a mark that it declares as user-defined
    symbol would be found in text, so it is loaded as control symbol.
    """

    file_name = "tokenizer.model"

    def __init__(self, content: bytes, name: str) -> None:
        """Raises ArtefactError: `content` is not a SentencePiece model; the message calls it `name`."""
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ArtefactError(
                f"{name} is damaged (SentencePiece cannot read it): train it again with stage=tokenizer, or give "
                "another file"
            ) from error
        self.vocab_size: int = processor.get_piece_size()
        pieces = [processor.id_to_piece(number) for number in range(self.vocab_size)]
        self.is_trained = pieces[: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
        control = [number for number in range(self.vocab_size) if processor.is_control(number)]
        if not self.is_trained and any(pieces[n] in NEVER_TEXT for n in range(len(pieces)) if n not in set(control)):
            processor = sentencepiece.SentencePieceProcessor(model_proto=_with_control_marks(content))
            control = [number for number in range(self.vocab_size) if processor.is_control(number)]
        if self.is_trained:
            control = list(range(len(SPECIAL_TOKENS)))
        self._processor = processor
        self.special_ids = {pieces[number]: number for number in control}
        self._without_bytes = {*control, processor.unk_id()}
        end: int = processor.eos_id()
        self.end_of_text = end if end >= 0 else None
        # SentencePiece reads a literal U+2581 as a space, so our own models encode it as its three bytes.
        self._literal_space_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        if not self.is_trained:
            return self._processor.encode(text)
        first, *rest = text.split(SPACE)
        ids: list[int] = self._processor.encode(first)
        for part in rest:
            ids += self._literal_space_ids
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return self._processor.decode(list(ids))

    def piece(self, number: int) -> str:
        """The name of a token for people."""
        return self._processor.id_to_piece(number).replace(SPACE, " ")

    def bytes_of(self, number: int) -> bytes:
        """The bytes of a token; a control symbol has none."""
        if number in self._without_bytes:
            return b""
        piece: str = self._processor.id_to_piece(number)
        if self._processor.is_byte(number):
            return bytes([int(piece.removeprefix("<0x").removesuffix(">"), 16)])
        return piece.replace(SPACE, " ").encode()


def with_marks(content: bytes, marks: Sequence[str]) -> bytes:
    """The model with `marks` appended as control symbols: ids behind those that are there."""
    model = _parsed(content)
    for mark in marks:
        model.pieces.add(piece=mark, score=0.0, type=CONTROL)
    return model.SerializeToString(deterministic=True)


def _with_control_marks(content: bytes) -> bytes:
    model = _parsed(content)
    for piece in model.pieces:
        if piece.piece in NEVER_TEXT and piece.type == USER_DEFINED:
            piece.type = CONTROL
    return model.SerializeToString(deterministic=True)


def _parsed(content: bytes) -> Any:
    """The model as protobuf message."""
    from sentencepiece import sentencepiece_model_pb2

    return vars(sentencepiece_model_pb2)["ModelProto"].FromString(content)
