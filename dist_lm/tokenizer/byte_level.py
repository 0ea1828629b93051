"""The vocabulary of a Hugging Face `tokenizer.json` with byte-level BPE, as of GPT-2, Llama 3, Qwen and SmolLM2."""

import json
from collections.abc import Sequence
from typing import Any

from dist_lm.errors import ArtefactError, UserError
from dist_lm.tokenizer.symbols import NEVER_TEXT

# the bytes of text: UTF-8 without control characters and rare planes, for which SmolLM2 has no pieces
TEXT_BYTES = (*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))
PROBE = 'def f(x):\n    return "é漢😀"  # a\n\tb\r\n\n \t  c  ' + "".join(map(chr, range(0x20, 0x7F)))


class ByteLevelModel:
    """Encodes as the package `tokenizers` does with `split_special_tokens=True`: no text becomes a special token.

    Marks of ours that the file declares as plain added tokens count as special ones here.
    """

    file_name = "tokenizer.json"
    is_trained = False
    end_of_text: int | None = None  # its name says it

    def __init__(self, content: bytes, name: str) -> None:
        """Raises ArtefactError: `content` is not a byte-level BPE; the message calls it `name`."""
        value = _read(content, name)
        added = value["added_tokens"]
        for token in added:
            token["special"] = token["special"] or token["content"] in NEVER_TEXT
        self._tokenizer: Any = _tokenizer(json.dumps(value | {"truncation": None, "padding": None}), name)
        self._tokenizer.encode_special_tokens = True  # special tokens that a text spells are text
        self.special_ids: dict[str, int] = {token["content"]: token["id"] for token in added if token["special"]}
        first = self._tokenizer.encode("a").ids[0]  # by the file's post-processor
        self.opening: int | None = first if first in self.special_ids.values() else None
        texts = {token["id"]: token["content"] for token in added}
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(ids.values())
        self._pieces = [""] * self.vocab_size
        self._bytes = [b""] * self.vocab_size
        special, byte_of = set(self.special_ids.values()), _byte_of_character()
        for piece, number in ids.items():
            self._pieces[number] = piece
            if number in texts:
                self._bytes[number] = b"" if number in special else texts[number].encode()
            elif foreign := [character for character in piece if character not in byte_of]:
                raise ArtefactError(
                    f"{name}: not a byte-level BPE: its piece {piece!r} holds {foreign[0]!r}, which stands for no "
                    "byte: expected one that was trained behind the pre_tokenizer ByteLevel"
                )
            else:
                self._bytes[number] = bytes(byte_of[character] for character in piece)
        self._check_text_comes_back(ids, name)
        if read := [mark for mark, number in self.special_ids.items() if number in self.encode(mark)]:
            raise ArtefactError(f"{name}: text that spells {read[0]} becomes this mark: use another tokenizer")

    def _check_text_comes_back(self, ids: dict[str, int], name: str) -> None:
        """Refuse a vocabulary or a pre-tokenizer that loses text. A normaliser may change text: this is its purpose."""
        character_of = {byte: character for character, byte in _byte_of_character().items()}
        if lost := [byte for byte in TEXT_BYTES if character_of[byte] not in ids]:
            shown = ", ".join(f"0x{byte:02X}" for byte in lost[:8]) + (" ..." if len(lost) > 8 else "")
            raise ArtefactError(
                f"{name}: text would be lost: it has no piece for {len(lost)} bytes of UTF-8 text ({shown}): train it "
                "with initial_alphabet=ByteLevel.alphabet(), or use another tokenizer"
            )
        normaliser = self._tokenizer.normalizer
        text = normaliser.normalize_str(PROBE) if normaliser else PROBE
        if (found := self.decode(self.encode(PROBE))) != text:
            place = next((n for n, (a, b) in enumerate(zip(found, text, strict=False)) if a != b), len(found))
            raise ArtefactError(
                f"{name}: text does not come back: {text[place : place + 12]!r} becomes "
                f"{found[place : place + 12]!r}: expected a pre_tokenizer that keeps all text, such as ByteLevel "
                "without add_prefix_space"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return b"".join(self._bytes[number] for number in ids).decode(errors="replace")

    def piece(self, number: int) -> str:
        """The name of a token for people: its text, a special token's name, or bytes as `<0x0D>`."""
        content = self._bytes[number]
        if not content:
            return self._pieces[number]
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in content)

    def bytes_of(self, number: int) -> bytes:
        """The bytes of a token; a special token has none."""
        return self._bytes[number]


def with_marks(content: bytes, marks: Sequence[str], vocab_size: int) -> bytes:
    """The file with `marks` appended as added tokens: ids from `vocab_size` on."""
    value = json.loads(content)
    value["added_tokens"] += [
        {
            "id": vocab_size + place,
            "content": mark,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": mark.startswith("<|"),
        }
        for place, mark in enumerate(marks)
    ]
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def with_opening(content: bytes, mark: str) -> bytes:
    """The file with a post-processor that puts the special token `mark` before every text."""
    from tokenizers import Tokenizer, processors

    tokenizer: Any = Tokenizer.from_str(content.decode())
    number = tokenizer.token_to_id(mark)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{mark} $A", special_tokens=[(mark, number)])
    return tokenizer.to_str(pretty=True).encode()


def _read(content: bytes, name: str) -> dict[str, Any]:
    """The file as JSON, if it is a byte-level BPE."""
    try:
        value = json.loads(content)
        model, decoder = value["model"], value["decoder"] or {}
        decoders = decoder.get("decoders", [decoder])
        is_bpe = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")
        fits = is_bpe and any(one.get("type") == "ByteLevel" for one in decoders)
        value.setdefault("added_tokens", [])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        why = {KeyError: f"it has no key {error}", json.JSONDecodeError: f"it is no JSON: {error}"}
        raise ArtefactError(
            f"{name}: not a tokenizer.json of Hugging Face ({why.get(type(error), 'its values have other types')})"
        ) from error
    if not fits:
        raise ArtefactError(
            f"{name}: not a byte-level BPE: expected one (as of Llama 3, Qwen, SmolLM2), or the tokenizer.model of "
            "SentencePiece that this file was made of"
        )
    return value


def _tokenizer(text: str, name: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"{name} needs the package tokenizers: pip install tokenizers") from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises plain Exception
        raise ArtefactError(f"{name}: the package tokenizers cannot read it ({' '.join(str(error).split())})") from None


def _byte_of_character() -> dict[str, int]:
    """The character that stands for each byte in a byte-level piece (`bytes_to_unicode` of GPT-2), inverted."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
