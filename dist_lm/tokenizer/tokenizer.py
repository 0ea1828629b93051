"""Text to token ids and back.

A tokenizer is a file: `tokenizer.model` of SentencePiece, trained by us or by somebody else, or `tokenizer.json` of
Hugging Face. Its hash names it in corpora and checkpoints.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece

from dist_lm.document import Document, TokenizedDocument
from dist_lm.errors import ArtefactError, UserError, utf8
from dist_lm.storage import durable
from dist_lm.tokenizer import byte_level
from dist_lm.tokenizer.byte_level import ByteLevelModel
from dist_lm.tokenizer.symbols import ALIASES, END_OF_TEXT, MARKS, NEVER_TEXT, PAD, SPACE, SPECIAL_TOKENS

CONTROL, USER_DEFINED = 3, 4  # ModelProto.SentencePiece.Type
NO_PIECE = "<none>"  # in place of the name of a special token that a model lacks; an empty name is the default


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
        end, begin = processor.eos_id(), processor.bos_id()
        self.end_of_text: int | None = end if end >= 0 else None
        self.opening: int | None = None if self.is_trained or begin < 0 else begin
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


def sentencepiece_with_marks(content: bytes, marks: Sequence[str]) -> bytes:
    """The model with `marks` appended as control symbols: ids behind those that are there."""
    model = sentencepiece_proto(content)
    for mark in marks:
        model.pieces.add(piece=mark, score=0.0, type=CONTROL)
    return model.SerializeToString(deterministic=True)


def sentencepiece_without_opening(content: bytes) -> bytes:
    """The model without beginning of sentence: texts are not opened by it."""
    model = sentencepiece_proto(content)
    model.trainer_spec.bos_id, model.trainer_spec.bos_piece = -1, NO_PIECE
    return model.SerializeToString(deterministic=True)


def _with_control_marks(content: bytes) -> bytes:
    model = sentencepiece_proto(content)
    for piece in model.pieces:
        if piece.piece in NEVER_TEXT and piece.type == USER_DEFINED:
            piece.type = CONTROL
    return model.SerializeToString(deterministic=True)


def sentencepiece_proto(content: bytes) -> Any:
    """The model as protobuf message."""
    from sentencepiece import sentencepiece_model_pb2

    return vars(sentencepiece_model_pb2)["ModelProto"].FromString(content)


FORMAT = 2  # of the special tokens and symbols; recorded in the tokenizer's report. One more with every change
CONVERSATIONS = "conversations.json"  # a `KeptTemplate`, beside the file of the tokenizer
UINT16 = 65_536  # largest vocabulary whose ids are uint16


class Vocabulary(Protocol):
    """What a file of a tokenizer holds. `encode` gives no id of `special_ids`, whatever the text spells."""

    file_name: str  # in a work directory
    vocab_size: int
    is_trained: bool  # by `train_tokenizer`
    special_ids: dict[str, int]  # special tokens by the names they have in the file
    end_of_text: int | None  # if the file says so; else a special token's name does
    opening: int | None  # the special token that the file puts before every text

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, number: int) -> str: ...
    def bytes_of(self, number: int) -> bytes: ...


@dataclass(frozen=True)
class Opening:
    """The first token of a document: end-of-text in shards, and what the model reads in its place.

    A model whose tokenizer begins every text with a token of its own (`<s>`, `<|begin_of_text|>`) has seen no document
    without it. The token that ends a document stays end-of-text.
    """

    end_of_text: int
    first: int

    def put(self, tokens: np.ndarray) -> np.ndarray:
        """Put `first` into the beginning of a document, (n,), in place of the end-of-text of the shards."""
        if len(tokens) and tokens[0] == self.end_of_text:
            tokens[0] = self.first
        return tokens


@dataclass(frozen=True)
class KeptTemplate:
    """The chat template of an imported model that lays conversations out otherwise than ours (`chat.kept_template`)."""

    text: str  # Jinja
    special_tokens: tuple[tuple[str, str], ...]  # that the template may use: (`bos_token`, its text), ...
    day: str  # of the import, as 2026-01-31: what the template takes for today

    @classmethod
    def read(cls, folder: Path) -> "KeptTemplate | None":
        """That beside a tokenizer; None: conversations are laid out as ours."""
        if not (path := folder / CONVERSATIONS).is_file():
            return None
        value = durable.read_json(path)
        try:
            return cls(value["chat_template"], tuple(sorted(value["special_tokens"].items())), value["day"])
        except (KeyError, AttributeError) as error:
            raise ArtefactError(f"{path}: {error!r} is missing: import the model again") from error

    def write(self, folder: Path) -> None:
        """Write it beside a tokenizer."""
        value = {"chat_template": self.text, "special_tokens": dict(self.special_tokens), "day": self.day}
        durable.write_json(folder / CONVERSATIONS, value)


class NoEndOfTextError(ArtefactError):
    """A tokenizer has no end-of-text that we know."""


class Tokenizer:
    """A tokenizer. `decode(encode(text)) == text` for a trained one; an existing one may normalise the text first."""

    def __init__(self, content: bytes, name: str, kept_template: KeptTemplate | None = None) -> None:
        """`content`: that of `tokenizer.model` or `tokenizer.json`; `name`: the file's name in error messages.

        Raises:
            ArtefactError: it is not such a file.
            NoEndOfTextError: it has no end-of-text.
        """
        self.kept_template = kept_template  # None: conversations are laid out as ours
        self._vocabulary = read_vocabulary(content, name)
        self.name = name
        self.vocab_size = self._vocabulary.vocab_size
        self.is_trained = self._vocabulary.is_trained
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= UINT16 else np.uint32)  # of ids in shards
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.special_ids = special_ids(self._vocabulary)  # of marks by our names, of others by their own
        if END_OF_TEXT not in self.special_ids:
            names = ", ".join((END_OF_TEXT, *ALIASES[END_OF_TEXT]))
            raise NoEndOfTextError(
                f"{name} has no end-of-text (none of {names}): tokenizer.add_marks=true appends the marks it lacks"
            )
        self.eot_id = self.special_ids[END_OF_TEXT]
        self.pad_id = self.special_ids.get(PAD, self.eot_id)  # fills rows up; never looked for
        # SentencePiece's dummy prefix: every text that is encoded gets a space before it
        self.adds_space = not self.is_trained and self.content(self._vocabulary.encode("a")) == b" a"
        own = self._vocabulary.opening
        self.opening = Opening(self.eot_id, self.eot_id if own is None else own)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read `path`.

        Raises:
            ArtefactError: it is missing, damaged, or no tokenizer.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ArtefactError(
                f"{path}: no tokenizer there ({error.strerror}): train it with stage=tokenizer"
            ) from error
        return cls(content, str(path), KeptTemplate.read(path.parent))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without any special token, even where the text spells one.

        Raises:
            UserError: `text` holds a lone surrogate.
        """
        utf8(text, "text")
        return self._vocabulary.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special tokens have no text; bytes that are not UTF-8 become U+FFFD."""
        return self._vocabulary.decode([int(number) for number in ids])

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of `text` as the beginning of a document, as a model reads it: the tokenizer's opening is first.

        Raises:
            UserError: `text` holds a lone surrogate.
        """
        return [self.opening.first, *self.encode(text)]

    def encode_document(self, document: Document) -> TokenizedDocument:
        """The document as shards hold it, with end-of-text before it.

        Raises:
            UserError: the text holds a lone surrogate; the message names the document's source.
        """
        content = utf8(document.text, document.source)
        return TokenizedDocument(
            tokens=np.array([self.eot_id, *self._vocabulary.encode(document.text)], self.dtype),
            n_bytes=len(content),
            language=document.language,
            source=document.source,
            licence=document.licence,
            repository=document.repository,
            own_licence=document.own_licence,
        )

    def mark(self, name: str) -> list[int]:
        """A mark: one token, or the tokens of its name as text if the tokenizer lacks it."""
        number = self.special_ids.get(name)
        return self._vocabulary.encode(name) if number is None else [number]

    def mark_id(self, name: str) -> int:
        """The token of a mark.

        Raises:
            UserError: the tokenizer lacks it.
        """
        if name not in self.special_ids:
            raise UserError(
                f"{self.name} has no {name}: build the work directory with tokenizer.add_marks=true, which appends the "
                "marks that a tokenizer lacks"
            )
        return self.special_ids[name]

    @property
    def opening_ids(self) -> tuple[int, ...]:
        """The special tokens that transformers puts before a text with our export."""
        own = self.eot_id if self.is_trained else self._vocabulary.opening
        return () if own is None else (own,)

    @property
    def file_names(self) -> dict[str, int]:
        """The special tokens by the names that they have in the file."""
        return self._vocabulary.special_ids

    def lacking(self) -> tuple[str, ...]:
        """The marks that the tokenizer lacks; they are plain text."""
        return tuple(mark for mark in MARKS if mark not in self.special_ids)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token for people: its text, a byte as `<0x0D>`, a special token by its name."""
        return [self._vocabulary.piece(int(number)) for number in ids]

    def vocabulary(self) -> list[bytes]:
        """The bytes of every token, by id; a special token has none.

        The bytes of `encode(text)`, joined, are `text` in UTF-8, after the tokenizer's own normaliser. One character
        may take several tokens.
        """
        return [self._vocabulary.bytes_of(number) for number in range(self.vocab_size)]

    def content(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, joined; unlike `decode`, exact for bytes that are not UTF-8."""
        return b"".join(self._vocabulary.bytes_of(int(number)) for number in ids)


def shown(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Decode tokens for people, with the names of reserved tokens."""
    special = {number: name for name, number in tokenizer.special_ids.items()}
    parts, text = [], list[int]()
    for token in tokens:
        if token in special:
            parts += [tokenizer.decode(text), special[token]]
            text = []
        else:
            text.append(token)
    return "".join([*parts, tokenizer.decode(text)])


def read_vocabulary(content: bytes, name: str) -> Vocabulary:
    """The vocabulary in a file; JSON is one of Hugging Face."""
    is_json = content.lstrip()[:1] == b"{"
    return ByteLevelModel(content, name) if is_json else SentencePieceModel(content, name)


def special_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """The special tokens by name; a mark of ours that the file calls otherwise has our name."""
    found = dict(vocabulary.special_ids)
    if vocabulary.is_trained:
        return found
    for mark, names in ALIASES.items():
        known = [name for name in (mark, *names) if name in found]
        if mark == END_OF_TEXT and vocabulary.end_of_text is not None:
            known = [name for name, number in found.items() if number == vocabulary.end_of_text]
        if known and known[0] != mark:
            found[mark] = found.pop(known[0])
    return found


def with_marks(content: bytes, name: str) -> bytes:
    """The tokenizer with the marks that it lacks appended; the same bytes if it has all of them."""
    vocabulary = read_vocabulary(content, name)
    known = special_ids(vocabulary)
    lacking = [mark for mark in MARKS if mark not in known]
    if not lacking:
        return content
    if isinstance(vocabulary, ByteLevelModel):
        return byte_level.with_marks(content, lacking, vocabulary.vocab_size)
    return sentencepiece_with_marks(content, lacking)
