"""Turns text into token ids and back.

A tokenizer is a file: `tokenizer.model` of SentencePiece, trained by us or by somebody else, or `tokenizer.json` of
Hugging Face. Its hash names it in corpora and checkpoints.
"""

import hashlib
import re
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
NO_PIECE = "<none>"  # stands for the name of a special token that a model lacks; an empty name is the default


class SentencePieceModel:
    """A model of `train_tokenizer`, or an existing one.

    An existing model encodes as SentencePiece does, with one difference: a mark that it declares as user-defined
    symbol would be found in text, so it is loaded as control symbol.
    """

    file_name = "tokenizer.model"

    def __init__(self, content: bytes, name: str) -> None:
        """Reads the content of a `tokenizer.model`; messages call it `name`.

        Raises:
            ArtefactError: `content` is not a SentencePiece model.
        """
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            vocab_size: int = processor.get_piece_size()
            pieces: list[str] = [processor.id_to_piece(token_id) for token_id in range(vocab_size)]
        except (RuntimeError, ValueError) as error:  # ValueError: a piece, or the error's own text, is not UTF-8
            raise ArtefactError(
                f"{name} is damaged (SentencePiece cannot read it): train it again with stage=tokenizer, or give "
                "another file"
            ) from error
        self.vocab_size = vocab_size
        self.is_trained = pieces[: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)

        # SentencePiece finds user-defined symbols in text, so a mark must not be one.
        control_ids = _control_ids(processor)
        ids_in_text = {*range(self.vocab_size)} - {*control_ids}
        if not self.is_trained and any(pieces[token_id] in NEVER_TEXT for token_id in ids_in_text):
            processor = sentencepiece.SentencePieceProcessor(model_proto=_with_control_marks(content))
            control_ids = _control_ids(processor)

        # SentencePiece has a type of its own for the unknown token, which is one of our special tokens.
        if self.is_trained:
            control_ids = sorted([*control_ids, processor.unk_id()])

        self._processor = processor
        self.special_ids = {pieces[token_id]: token_id for token_id in control_ids}
        self._without_bytes = {*control_ids, processor.unk_id()}

        # SentencePiece gives -1 for a token that the model lacks.
        end_id = processor.eos_id()
        begin_id = processor.bos_id()
        self.end_of_text: int | None = end_id if end_id >= 0 else None
        self.first_id: int | None = None if self.is_trained or begin_id < 0 else begin_id

        # SentencePiece reads a literal U+2581 as a space, so our own models encode it as its three bytes.
        self._literal_space_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, without the first token of documents; never the id of a special token.

        A literal U+2581 keeps ids of its own in a tokenizer of ours; in others it passes for a space.
        """
        if not self.is_trained:
            return self._processor.encode(text)

        # The text between two such characters is encoded as usual.
        first_part, *more_parts = text.split(SPACE)
        ids: list[int] = self._processor.encode(first_part)
        for part in more_parts:
            ids += self._literal_space_ids
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`."""
        return self._processor.decode(list(ids))

    def piece(self, number: int) -> str:
        """Returns the name of a token for people."""
        return self._processor.id_to_piece(number).replace(SPACE, " ")

    def bytes_of(self, number: int) -> bytes:
        """Returns the bytes of a token; a control symbol has none."""
        if number in self._without_bytes:
            return b""
        piece: str = self._processor.id_to_piece(number)
        if self._processor.is_byte(number):
            return bytes([int(piece.removeprefix("<0x").removesuffix(">"), 16)])
        return piece.replace(SPACE, " ").encode()


def _control_ids(processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    return [token_id for token_id in range(processor.get_piece_size()) if processor.is_control(token_id)]


def sentencepiece_with_marks(content: bytes, marks: Sequence[str]) -> bytes:
    """Returns the model with `marks` appended as control symbols; the ids of its own pieces stay."""
    model = sentencepiece_proto(content)
    for mark in marks:
        model.pieces.add(piece=mark, score=0.0, type=CONTROL)
    return model.SerializeToString(deterministic=True)


def sentencepiece_without_first_token(content: bytes) -> bytes:
    """Returns the model without a beginning of sentence, so that no token opens a text."""
    model = sentencepiece_proto(content)
    model.trainer_spec.bos_id = -1
    model.trainer_spec.bos_piece = NO_PIECE
    return model.SerializeToString(deterministic=True)


def _with_control_marks(content: bytes) -> bytes:
    """Returns the model with every user-defined symbol that is a mark as a control symbol."""
    model = sentencepiece_proto(content)
    for piece in model.pieces:
        if piece.piece in NEVER_TEXT and piece.type == USER_DEFINED:
            piece.type = CONTROL
    return model.SerializeToString(deterministic=True)


def sentencepiece_proto(content: bytes) -> Any:
    """Returns the model as a protobuf message (`ModelProto`)."""
    from sentencepiece import sentencepiece_model_pb2

    return vars(sentencepiece_model_pb2)["ModelProto"].FromString(content)


FORMAT = 2  # counts changes of the special tokens and symbols; the tokenizer's report records it
CONVERSATIONS = "conversations.json"  # holds a `KeptTemplate`, beside the file of the tokenizer
UINT16 = 65_536  # largest vocabulary whose ids are uint16


class Vocabulary(Protocol):
    """The content of a tokenizer's file. `encode` gives no id of `special_ids`, whatever the text spells."""

    file_name: str  # in a work directory
    vocab_size: int
    is_trained: bool  # whether `train_tokenizer` made it
    special_ids: dict[str, int]  # special tokens by the names they have in the file
    end_of_text: int | None  # None: the file does not say it, but the name of a special token does
    first_id: int | None  # the special token that the file puts before every text

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, number: int) -> str: ...
    def bytes_of(self, number: int) -> bytes: ...


@dataclass(frozen=True)
class FirstToken:
    """The first token of a document: shards hold end-of-text there, and the model reads `id` in its place.

    A model whose tokenizer begins every text with a token of its own (`<s>`, `<|begin_of_text|>`) has seen no document
    without it. The token that ends a document stays end-of-text.
    """

    end_of_text: int
    id: int

    def put(self, tokens: np.ndarray) -> np.ndarray:
        """Puts `id` in place of the end-of-text of the shards.

        `tokens`, (n,), is a document or a part of one. It is changed and returned.
        """
        if len(tokens) and tokens[0] == self.end_of_text:
            tokens[0] = self.id
        return tokens


@dataclass(frozen=True)
class KeptTemplate:
    """The chat template of an imported model that lays conversations out otherwise than ours (`chat.kept_template`)."""

    text: str  # Jinja
    special_tokens: tuple[tuple[str, str], ...]  # the template may use them: (`bos_token`, its text), ...
    day: str  # day of the import, such as 2026-01-31, which the template takes for today

    @classmethod
    def read(cls, folder: Path) -> "KeptTemplate | None":
        """Returns the template beside a tokenizer; None if the folder has none: conversations are laid out as ours.

        Raises:
            ArtefactError: the file, `conversations.json`, is no JSON or lacks a key.
            OSError: it cannot be read.
        """
        path = folder / CONVERSATIONS
        if not path.is_file():
            return None
        content = durable.read_json(path)
        try:
            return cls(content["chat_template"], tuple(sorted(content["special_tokens"].items())), content["day"])
        except (KeyError, AttributeError) as error:
            raise ArtefactError(f"{path}: {error!r} is missing: import the model again") from error

    def write(self, folder: Path) -> None:
        """Writes the template beside a tokenizer."""
        content = {"chat_template": self.text, "special_tokens": dict(self.special_tokens), "day": self.day}
        durable.write_json(folder / CONVERSATIONS, content)


class NoEndOfTextError(ArtefactError):
    """Raised for a tokenizer that has no end-of-text that we know."""


class Tokenizer:
    """A tokenizer. `decode(encode(text)) == text` for a trained one; an existing one may normalise the text first."""

    def __init__(self, content: bytes, name: str, kept_template: KeptTemplate | None = None) -> None:
        """Reads the content of a `tokenizer.model` or `tokenizer.json`; messages call it `name`.

        Raises:
            ArtefactError: `content` is not such a file.
            NoEndOfTextError (an ArtefactError): it has no end-of-text.
            UserError: the package `tokenizers` is needed and not installed.
        """
        self.name = name
        self.file_content = content
        self.kept_template = kept_template  # None: conversations are laid out as ours
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._vocabulary = read_vocabulary(content, name)
        self.vocab_size = self._vocabulary.vocab_size
        self.is_trained = self._vocabulary.is_trained
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= UINT16 else np.uint32)  # shards hold ids of this type

        self.special_ids = special_ids(self._vocabulary)  # marks have our names, other special tokens their own
        if END_OF_TEXT not in self.special_ids:
            names = ", ".join((END_OF_TEXT, *ALIASES[END_OF_TEXT]))
            raise NoEndOfTextError(
                f"{name} has no end-of-text (none of {names}): tokenizer.add_marks=true appends the marks it lacks"
            )
        self.eot_id = self.special_ids[END_OF_TEXT]
        self.pad_id = self.special_ids.get(PAD, self.eot_id)  # fills rows of a batch; nothing searches for it

        # Without a first token of its own, a tokenizer begins documents with end-of-text, as shards do.
        first_id = self._vocabulary.first_id
        if first_id is None:
            first_id = self.eot_id
        self.first_token = FirstToken(self.eot_id, first_id)

        # SentencePiece's dummy prefix puts a space before every text that is encoded.
        self.adds_space = not self.is_trained and self.content(self._vocabulary.encode("a")) == b" a"

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads the file at `path` and the chat template beside it.

        Raises:
            ArtefactError: the file is missing, damaged, no tokenizer, or has no end-of-text (NoEndOfTextError); or the
                chat template is damaged.
            UserError: the package `tokenizers` is needed and not installed.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ArtefactError(
                f"{path}: no tokenizer there ({error.strerror}): train it with stage=tokenizer"
            ) from error
        return cls(content, str(path), KeptTemplate.read(path.parent))

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, without any special token, even where the text spells one.

        Raises:
            UserError: `text` holds a lone surrogate.
        """
        utf8(text, "text")
        return self._vocabulary.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`. Special tokens have no text; bytes that are not UTF-8 become U+FFFD."""
        return self._vocabulary.decode([int(token_id) for token_id in ids])

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the token ids of `text` as the beginning of a document, with its first token.

        Raises:
            UserError: `text` holds a lone surrogate.
        """
        return [self.first_token.id, *self.encode(text)]

    def encode_document(self, document: Document) -> TokenizedDocument:
        """Returns the text as shards hold it: token ids (n,) of `dtype`, end-of-text first, and the text's size in
        bytes.

        Special tokens that the text spells are encoded as text. `document.form` is not looked at.

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
        """Returns the ids of a mark: one id, or those of its name as text if the tokenizer lacks the mark."""
        mark_id = self.special_ids.get(name)
        if mark_id is None:
            return self._vocabulary.encode(name)
        return [mark_id]

    def mark_id(self, name: str) -> int:
        """Returns the token id of a mark.

        Raises:
            UserError: the tokenizer lacks the mark.
        """
        if name not in self.special_ids:
            raise UserError(
                f"{self.name} has no {name}: build the work directory with tokenizer.add_marks=true, which appends the "
                "marks that a tokenizer lacks"
            )
        return self.special_ids[name]

    @property
    def first_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens that transformers puts before a text with our export; none or one."""
        if self.is_trained:
            return (self.eot_id,)
        if self._vocabulary.first_id is None:
            return ()
        return (self._vocabulary.first_id,)

    @property
    def special_ids_in_file(self) -> dict[str, int]:
        """Ids of the special tokens, by the names that the tokenizer's file gives them."""
        return self._vocabulary.special_ids

    def lacking(self) -> tuple[str, ...]:
        """Returns the marks that the tokenizer lacks; it encodes them as plain text."""
        return tuple(mark for mark in MARKS if mark not in self.special_ids)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns each token for people: its text, a byte as `<0x0D>`, a special token by its name."""
        return [self._vocabulary.piece(int(token_id)) for token_id in ids]

    def vocabulary(self) -> list[bytes]:
        """Returns the bytes of every token, by id; a special token has none.

        The concatenated bytes of `encode(text)` are `text` in UTF-8, after the tokenizer's own normaliser. One
        character may take several tokens.
        """
        return [self._vocabulary.bytes_of(token_id) for token_id in range(self.vocab_size)]

    def content(self, ids: Iterable[int]) -> bytes:
        """Returns the concatenated bytes of `ids`; unlike `decode`, exact for bytes that are not UTF-8."""
        return b"".join(self._vocabulary.bytes_of(int(token_id)) for token_id in ids)


def text_with_marks(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns the text of tokens for people, with the names of special tokens; bytes that are not UTF-8 are U+FFFD."""
    names = {token_id: name for name, token_id in tokenizer.special_ids.items()}
    parts: list[str] = []
    text_ids: list[int] = []
    for token in tokens:
        if token in names:
            # Text is decoded up to the special token at once: a character may take several tokens.
            parts += [tokenizer.decode(text_ids), names[token]]
            text_ids = []
        else:
            text_ids.append(token)
    return "".join([*parts, tokenizer.decode(text_ids)])


def tokens_with_marks(text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of a text that a trusted person wrote: the name of a special token in it is that token.

    The inverse of `text_with_marks`, except that a text has several ways to be cut into tokens.
    """
    ids = tokenizer.special_ids
    if not ids:
        return tokenizer.encode(text)

    # The longer of two names that begin alike is meant.
    any_name = "|".join(re.escape(name) for name in sorted(ids, key=len, reverse=True))
    tokens: list[int] = []
    for part in re.split(f"({any_name})", text):
        if part in ids:
            tokens.append(ids[part])
        elif part:
            tokens += tokenizer.encode(part)
    return tokens


def read_vocabulary(content: bytes, name: str) -> Vocabulary:
    """Returns the vocabulary in the content of a file; JSON is a `tokenizer.json` of Hugging Face.

    Args:
        name: the file, for messages.

    Raises:
        ArtefactError: `content` is neither that nor a SentencePiece model.
        UserError: the package `tokenizers` is needed and not installed.
    """
    is_json = content.lstrip()[:1] == b"{"
    if is_json:
        return ByteLevelModel(content, name)
    return SentencePieceModel(content, name)


def special_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Returns the ids of the special tokens by name; a mark of ours that the file calls otherwise has our name.

    For a vocabulary that is not ours, the file's own statement of end-of-text comes before the list of names `ALIASES`.
    The result has no mark that the vocabulary lacks; it is a copy.
    """
    ids = dict(vocabulary.special_ids)
    if vocabulary.is_trained:
        return ids

    for mark, aliases in ALIASES.items():
        names = [name for name in (mark, *aliases) if name in ids]
        if mark == END_OF_TEXT and vocabulary.end_of_text is not None:
            # The file knows better than a list of names.
            names = [name for name, token_id in ids.items() if token_id == vocabulary.end_of_text]
        if names and names[0] != mark:
            ids[mark] = ids.pop(names[0])
    return ids


def with_marks(content: bytes, name: str) -> bytes:
    """Returns the content of the file with the marks that it lacks appended; the same bytes if it has all of them.

    The ids of the other tokens stay.

    Args:
        name: the file, for messages.

    Raises:
        ArtefactError: `content` is no tokenizer file that we read.
        UserError: the package `tokenizers` is needed and not installed.
    """
    vocabulary = read_vocabulary(content, name)
    ids = special_ids(vocabulary)
    missing = [mark for mark in MARKS if mark not in ids]
    if not missing:
        return content
    if isinstance(vocabulary, ByteLevelModel):
        return byte_level.with_marks(content, missing, vocabulary.vocab_size)
    return sentencepiece_with_marks(content, missing)
