"""Reads the vocabulary of a Hugging Face `tokenizer.json` with byte-level BPE, as of GPT-2, Llama 3 and Qwen."""

import json
from collections.abc import Sequence
from typing import Any

from dist_lm.errors import ArtefactError, UserError
from dist_lm.tokenizer.symbols import NEVER_TEXT

# These bytes make up text: UTF-8 without control characters and rare planes, for which SmolLM2 has no pieces.
TEXT_BYTES = (*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))
PROBE = 'def f(x):\n    return "é漢😀"  # a\n\tb\r\n\n \t  c  ' + "".join(map(chr, range(0x20, 0x7F)))


class ByteLevelModel:
    """Encodes as the package `tokenizers` does with `split_special_tokens=True`: no text becomes a special token.

    Marks of ours that the file declares as plain added tokens count as special ones here.
    """

    file_name = "tokenizer.json"
    is_trained = False
    end_of_text: int | None = None  # the file does not say it; the name of a special token does

    def __init__(self, content: bytes, name: str) -> None:
        """Reads the content of a `tokenizer.json`; messages call it `name`.

        Raises:
            ArtefactError: `content` is not a byte-level BPE, loses text, or turns text into a special token.
            UserError: the package `tokenizers` is not installed.
        """
        tokenizer_json = _read(content, name)
        added_tokens = tokenizer_json["added_tokens"]
        for token in added_tokens:
            token["special"] = token["special"] or token["content"] in NEVER_TEXT

        # Truncation and padding of the file would change the ids of long and of short texts.
        unbounded = tokenizer_json | {"truncation": None, "padding": None}
        self._tokenizer: Any = json_tokenizer(json.dumps(unbounded), name)
        self._tokenizer.encode_special_tokens = True  # special tokens that a text spells are text

        self.special_ids: dict[str, int] = {t["content"]: t["id"] for t in added_tokens if t["special"]}
        # The file's post-processor may put a special token before every text.
        first_id = self._tokenizer.encode("a").ids[0]
        self.first_id: int | None = first_id if first_id in self.special_ids.values() else None

        # Ids need not be without gaps, so the largest one decides.
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())
        self._set_pieces(vocabulary, {t["id"]: t["content"] for t in added_tokens}, name)

        self._check_text_comes_back(vocabulary, name)
        if forgeable := [mark for mark, token_id in self.special_ids.items() if token_id in self.encode(mark)]:
            raise ArtefactError(f"{name}: text that spells {forgeable[0]} becomes this mark: use another tokenizer")

    def _set_pieces(self, vocabulary: dict[str, int], added_texts: dict[int, str], name: str) -> None:
        """Sets `_pieces` and `_bytes`, the name and the bytes of every token id; special and unused ids have no bytes,
        and an unused id has an empty name.

        Args:
            vocabulary: every piece and added token -> its id.
            added_texts: id -> text of the added tokens.
            name: the file, for messages.

        Raises:
            ArtefactError: a piece holds a character that stands for no byte.
        """
        special = set(self.special_ids.values())
        byte_of = _byte_of_character()
        self._pieces = [""] * self.vocab_size
        self._bytes = [b""] * self.vocab_size

        for piece, token_id in vocabulary.items():
            self._pieces[token_id] = piece
            if token_id in added_texts:
                # An added token stands for its text as it is, not for bytes written as characters.
                if token_id not in special:
                    self._bytes[token_id] = added_texts[token_id].encode()
                continue

            if foreign := [character for character in piece if character not in byte_of]:
                raise ArtefactError(
                    f"{name}: not a byte-level BPE: its piece {piece!r} holds {foreign[0]!r}, which stands for no "
                    "byte: expected one that was trained behind the pre_tokenizer ByteLevel"
                )
            self._bytes[token_id] = bytes(byte_of[character] for character in piece)

    def _check_text_comes_back(self, vocabulary: dict[str, int], name: str) -> None:
        """Refuses a vocabulary or a pre-tokenizer that loses text. A normaliser may change text: it is meant to.

        Raises:
            ArtefactError: a byte of UTF-8 text has no piece, or `PROBE` is decoded to another text than was encoded.
        """
        character_of = {byte: character for character, byte in _byte_of_character().items()}
        if missing := [byte for byte in TEXT_BYTES if character_of[byte] not in vocabulary]:
            listed = ", ".join(f"0x{byte:02X}" for byte in missing[:8]) + (" ..." if len(missing) > 8 else "")
            raise ArtefactError(
                f"{name}: text would be lost: it has no piece for {len(missing)} bytes of UTF-8 text ({listed}): train "
                "it with initial_alphabet=ByteLevel.alphabet(), or use another tokenizer"
            )

        text = PROBE
        if self._tokenizer.normalizer:
            text = self._tokenizer.normalizer.normalize_str(text)
        decoded = self.decode(self.encode(PROBE))
        if decoded == text:
            return

        # The message shows where the texts part, since a probe has many kinds of characters.
        pairs = zip(decoded, text, strict=False)
        start = next((index for index, (a, b) in enumerate(pairs) if a != b), len(decoded))
        raise ArtefactError(
            f"{name}: text does not come back: {text[start : start + 12]!r} becomes "
            f"{decoded[start : start + 12]!r}: expected a pre_tokenizer that keeps all text, such as ByteLevel "
            "without add_prefix_space"
        )

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, without the first token of documents."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._bytes[token_id] for token_id in ids).decode(errors="replace")

    def piece(self, number: int) -> str:
        """Returns the name of a token for people: its text, a special token's name, or bytes as `<0x0D>`."""
        content = self._bytes[number]
        if not content:
            return self._pieces[number]
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in content)

    def bytes_of(self, number: int) -> bytes:
        """Returns the bytes of a token; a special token has none."""
        return self._bytes[number]


def with_marks(content: bytes, marks: Sequence[str], vocab_size: int) -> bytes:
    """Returns the `tokenizer.json` with `marks` appended as added tokens, whose ids begin at `vocab_size`.

    The ids of the file stay. A mark that begins with `<|` becomes a special token, any other one a plain added token.
    The caller makes sure that the file is a `tokenizer.json` and lacks the marks; nothing is checked.
    """
    tokenizer_json = json.loads(content)
    tokenizer_json["added_tokens"] += [
        {
            "id": token_id,
            "content": mark,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": mark.startswith("<|"),
        }
        for token_id, mark in enumerate(marks, vocab_size)
    ]
    return json.dumps(tokenizer_json, ensure_ascii=False, indent=2).encode()


def with_first_token(content: bytes, mark: str) -> bytes:
    """Returns the file with a post-processor, in place of its own, that puts the special token `mark` before a text.

    The file must have the mark. Needs the package `tokenizers`.
    """
    from tokenizers import Tokenizer, processors

    tokenizer: Any = Tokenizer.from_str(content.decode())
    special_tokens = [(mark, tokenizer.token_to_id(mark))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{mark} $A", special_tokens=special_tokens)
    return tokenizer.to_str(pretty=True).encode()


def _read(content: bytes, name: str) -> dict[str, Any]:
    """Returns the file as JSON, with an empty list `added_tokens` if it had none.

    Args:
        name: the file, for messages.

    Raises:
        ArtefactError: it is not the `tokenizer.json` of a byte-level BPE.
    """
    try:
        tokenizer_json = json.loads(content)
        model = tokenizer_json["model"]
        decoder = tokenizer_json["decoder"] or {}
        decoders = decoder.get("decoders", [decoder])
        is_bpe = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")
        is_byte_level = is_bpe and any(step.get("type") == "ByteLevel" for step in decoders)
        tokenizer_json.setdefault("added_tokens", [])
    except RecursionError as error:
        raise ArtefactError(f"{name}: not a tokenizer.json of Hugging Face (it is nested too deeply)") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reasons = {KeyError: f"it has no key {error}", json.JSONDecodeError: f"it is no JSON: {error}"}
        reason = reasons.get(type(error), "its values have other types")
        raise ArtefactError(f"{name}: not a tokenizer.json of Hugging Face ({reason})") from error

    if not is_byte_level:
        raise ArtefactError(
            f"{name}: not a byte-level BPE: expected one (as of Llama 3, Qwen, SmolLM2), or the tokenizer.model of "
            "SentencePiece that this file was made of"
        )
    return tokenizer_json


def json_tokenizer(text: str, name: str) -> Any:
    """Returns the `tokenizers.Tokenizer` of the JSON `text`; messages call the file `name`.

    Raises:
        UserError: the package `tokenizers` is not installed.
        ArtefactError: the package cannot read the text.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"{name} needs the package tokenizers: pip install tokenizers") from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises plain Exception
        raise ArtefactError(f"{name}: the package tokenizers cannot read it ({' '.join(str(error).split())})") from None


def _byte_of_character() -> dict[str, int]:
    """Maps each character of a byte-level piece to its byte: `bytes_to_unicode` of GPT-2, inverted."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(unprintable)}
