"""Text to token ids and back, exactly."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from dist_lm.document import Document, TokenizedDocument
from dist_lm.errors import ArtefactError, utf8
from dist_lm.tokenizer.symbols import END_OF_TEXT, PAD, SPACE, SPECIAL_TOKENS

FORMAT = 2  # of the special tokens and symbols; recorded in the tokenizer's report. One more with every change


class Tokenizer:
    """A trained SentencePiece model. `decode(encode(text)) == text` for any Unicode text."""

    def __init__(self, model: bytes, name: str) -> None:
        """`model`: the content of a file that `train_tokenizer` wrote; `name`: its name in error messages.

        Raises:
            ArtefactError: it is not such a model, or has the special tokens of another format.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ArtefactError(
                f"{name} is damaged (SentencePiece cannot read it): train it again with stage=tokenizer"
            ) from error
        self.vocab_size: int = self._processor.get_piece_size()
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.special_ids = {piece: number for number, piece in enumerate(SPECIAL_TOKENS)}
        first = [self._processor.id_to_piece(number) for number in range(min(len(SPECIAL_TOKENS), self.vocab_size))]
        if first != list(SPECIAL_TOKENS):
            raise ArtefactError(
                f"{name} lacks the special tokens of dist_lm, format {FORMAT} (its first pieces are "
                f"{', '.join(first[:4])}): use another work_dir, or remove that file and run stage=tokenizer"
            )
        self.eot_id = self.special_ids[END_OF_TEXT]
        self.pad_id = self.special_ids[PAD]
        # SentencePiece reads a literal U+2581 as a space, so it is encoded as its three bytes.
        self._literal_space_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read `path`.

        Raises:
            ArtefactError: it is missing, damaged, or not a tokenizer of this format.
        """
        try:
            model = path.read_bytes()
        except OSError as error:
            raise ArtefactError(
                f"{path}: no tokenizer there ({error.strerror}): train it with stage=tokenizer"
            ) from error
        return cls(model, str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without any special token, even where the text spells one.

        Raises:
            UserError: `text` holds a lone surrogate.
        """
        utf8(text, "text")
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special tokens have no text; bytes that are not UTF-8 become U+FFFD."""
        return self._processor.decode([int(number) for number in ids])

    def encode_document(self, document: Document) -> TokenizedDocument:
        """The document, with end-of-text before it.

        Raises:
            UserError: the text holds a lone surrogate; the message names the document's source.
        """
        content = utf8(document.text, document.source)
        return TokenizedDocument(
            tokens=np.array([self.eot_id, *self._encode(document.text)], np.uint16),
            n_bytes=len(content),
            language=document.language,
            source=document.source,
            licence=document.licence,
        )

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token for people: its text, a byte as `<0x0D>`, a special token by its name."""
        return [self._processor.id_to_piece(int(number)).replace(SPACE, " ") for number in ids]

    def vocabulary(self) -> list[bytes]:
        """The bytes of every token, by id; a special token has none.

        The bytes of `encode(text)`, joined, are `text` in UTF-8. One character may take several tokens.
        """
        return [self._bytes_of(number) for number in range(self.vocab_size)]

    def content(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, joined; unlike `decode`, exact for bytes that are not UTF-8."""
        return b"".join(self._bytes_of(int(number)) for number in ids)

    def _bytes_of(self, number: int) -> bytes:
        piece: str = self._processor.id_to_piece(number)
        if number < len(SPECIAL_TOKENS):
            return b""
        if self._processor.is_byte(number):
            return bytes([int(piece.removeprefix("<0x").removesuffix(">"), 16)])
        return piece.replace(SPACE, " ").encode()

    def _encode(self, text: str) -> list[int]:
        first, *rest = text.split(SPACE)
        ids: list[int] = self._processor.encode(first)
        for part in rest:
            ids += self._literal_space_ids
            ids += self._processor.encode(part)
        return ids
