"""Reads a SentencePiece model back out of the `tokenizer.json` that transformers made of it.

`save_pretrained` writes `tokenizer.json` alone, so a folder that was saved after an export has no `tokenizer.model`.
A BPE of SentencePiece is its pieces in the order of their scores. The file has no scores, but the order of its merges
gives that of the pieces: SentencePiece joins any two neighbours that make a piece, the best piece first, and the file
lists every such pair.

A model of `train_tokenizer` comes back with the same bytes, and therefore with the same hash in corpora and runs.
These functions run in the process with limits (`dist_lm.interop.snapshot_files.parsed`).
"""

import json
import re
from base64 import b64decode
from collections.abc import Mapping
from typing import Any, NoReturn

from dist_lm.errors import ArtefactError, shown_value
from dist_lm.interop.gguf_tokenizer import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from dist_lm.tokenizer.byte_level import PROBE, json_tokenizer
from dist_lm.tokenizer.symbols import PAD, SPACE, SPECIAL_TOKENS
from dist_lm.tokenizer.tokenizer import NO_PIECE, SentencePieceModel, sentencepiece_proto

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# Steps of a normaliser that transformers writes for the options of SentencePiece.
SPACES = ("Replace", "String", " ", SPACE)
DUMMY_PREFIX = ("Replace", "Regex", rf"\A{SPACE}", SPACE * 2)
REMOVED_SPACES = (("Replace", "Regex", r"\A +| +\z", ""), ("Replace", "Regex", " {2,}", " "))
MOST_CHARACTERS = 20_000  # length of the pieces that both encode, to compare them


def is_of_sentencepiece(content: bytes) -> bool:
    """Returns whether the content of a `tokenizer.json` is a BPE with bytes for unknown characters, as SentencePiece
    has them; False if it is no JSON."""
    try:
        model = json.loads(content)["model"]
        return model["type"] == "BPE" and model["byte_fallback"] is True
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def sentencepiece_of(content: bytes, settings: Mapping[str, Any], where: str) -> bytes:
    """Returns the content of the `tokenizer.model` that the `tokenizer.json` in `content` was made of.

    It gives the same ids, and those of one of ours are the same bytes. Tokens that were added to it follow as special
    tokens or user-defined symbols.

    Args:
        settings: tokenizer_config.json: the names of the special tokens; of one of ours how it was trained.
        where: the file, for messages.

    Raises:
        ArtefactError: the file is damaged, or computes something that SentencePiece does not; names the key.
        UserError: the package `tokenizers` is not installed.
    """
    try:
        return _rebuilt(json.loads(content), settings, where)
    except ArtefactError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        reason = shown_value(f"{type(error).__name__}: {error}")
        raise ArtefactError(f"{where}: not a tokenizer.json of SentencePiece ({reason})") from error


def _rebuilt(tokenizer_json: dict[str, Any], settings: Mapping[str, Any], where: str) -> bytes:
    model, added_tokens = tokenizer_json["model"], tokenizer_json.get("added_tokens") or []
    texts = _texts(model["vocab"], where)
    added = {int(token["id"]): token for token in added_tokens}

    # Ours writes plain spaces in its pieces, since its tokenizer.json needs no normaliser.
    is_ours = texts[: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
    pieces = texts
    if is_ours:
        pieces = [text.replace(" ", SPACE) for text in texts]
    types = _types(texts, added, tokenizer_json, settings, where)
    scores = _scores(texts, types, model["merges"], where)

    rebuilt = sentencepiece_proto(b"")
    for piece, score, token_type in zip(pieces, scores, types, strict=True):
        entry = rebuilt.pieces.add(piece=piece, score=score)
        if token_type != NORMAL:  # the default, which SentencePiece leaves out
            entry.type = token_type
    # Tokens that were added later have ids behind those of the model.
    for token_id in range(len(texts), 1 + max(added, default=0)):
        if token_id not in added:
            _refuse(where, "added_tokens", f"no token {token_id}", "ids without gaps")
        text, is_special = added[token_id]["content"], added[token_id]["special"]
        rebuilt.pieces.add(piece=text.replace(" ", SPACE), score=0.0, type=CONTROL if is_special else USER_DEFINED)

    rebuilt.trainer_spec.vocab_size = len(texts)
    if is_ours:
        _set_options_of_ours(rebuilt, settings, where)
    else:
        _set_options(rebuilt, tokenizer_json, settings, where)
    written = rebuilt.SerializeToString(deterministic=True)
    _check_same_ids(tokenizer_json, rebuilt, written, where)
    return written


def _texts(vocabulary: Mapping[str, int], where: str) -> list[str]:
    """Returns the texts of the pieces by id.

    Raises:
        ArtefactError: the ids are not 0, 1, 2 ...
    """
    text_of = {token_id: text for text, token_id in vocabulary.items()}
    if sorted(text_of) != list(range(len(vocabulary))):
        _refuse(where, "model.vocab", f"{len(text_of)} ids", "the ids 0, 1, 2 ... without gaps")
    return [text_of[token_id] for token_id in range(len(vocabulary))]


def _types(
    texts: list[str],
    added: Mapping[int, dict[str, Any]],
    tokenizer_json: dict[str, Any],
    settings: Mapping[str, Any],
    where: str,
) -> list[int]:
    """Returns the type of each piece of SentencePiece, by id.

    Raises:
        ArtefactError: there is no unknown token, which SentencePiece needs.
    """
    unknown = tokenizer_json["model"].get("unk_token") or _text_of(settings, "unk_token") or "<unk>"
    if unknown not in texts:
        _refuse(where, "model.unk_token", unknown, "a piece: SentencePiece needs an unknown token")

    symbols = _symbols(tokenizer_json)
    types: list[int] = []
    for token_id, text in enumerate(texts):
        if text == unknown:
            types.append(UNKNOWN)
        elif token_id in added:
            # Marks of ours that parsers of text must see, such as <tool_call>, are no special tokens there.
            is_control = added[token_id]["special"] or text in SPECIAL_TOKENS
            types.append(CONTROL if is_control else USER_DEFINED)
        elif text in symbols:
            types.append(USER_DEFINED)
        elif BYTE_PIECE.fullmatch(text):
            types.append(BYTE)
        else:
            types.append(NORMAL)
    return types


def _symbols(tokenizer_json: dict[str, Any]) -> set[str]:
    """Returns the texts that the pre-tokenizer cuts out, which are the user-defined symbols of SentencePiece."""
    patterns = [
        step["pattern"]["Regex"] for step in _steps(tokenizer_json, "pre_tokenizer") if step.get("type") == "Split"
    ]
    alternatives = (text for pattern in patterns for text in re.split(r"(?<!\\)\|", pattern))
    return {re.sub(r"\\(.)", r"\1", text) for text in alternatives}


def _scores(texts: list[str], types: list[int], merges: list[Any], where: str) -> list[float]:
    """Returns the score of each piece, by id: the best piece has 0, and it falls by 1 from piece to piece.

    Raises:
        ArtefactError: the merges are not those of SentencePiece: every pair of pieces that makes a piece, and the pairs
            of one piece in a row.
    """
    learned = {text: token_id for token_id, text in enumerate(texts) if types[token_id] == NORMAL}
    # Older files write a merge as one text, with a space between its parts.
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    merged_texts = [first + second for first, second in pairs]

    rank: dict[str, int] = {}
    for index, (text, before) in enumerate(zip(merged_texts, [None, *merged_texts], strict=False)):
        if text not in learned:
            _refuse(where, "model.merges", pairs[index], "pairs that make a piece")
        if text != before and rank.setdefault(text, len(rank)) != len(rank) - 1:
            _refuse(where, "model.merges", pairs[index], "all pairs of a piece in a row, as SentencePiece has them")

    listed = set(pairs)
    for text in learned:
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in learned and pair[1] in learned and pair not in listed:
                _refuse(where, "model.merges", f"no {pair}", "every pair that makes a piece, as SentencePiece has them")

    # Pieces that nothing is merged to, such as single characters, need a score too.
    best_first = sorted(learned, key=lambda text: (rank.get(text, len(rank)), learned[text]))
    scores = [0.0] * len(texts)
    for index, text in enumerate(best_first):
        scores[learned[text]] = -float(index)
    return scores


def _set_options_of_ours(rebuilt: Any, settings: Mapping[str, Any], where: str) -> None:
    """Sets the options of `train_tokenizer`, in which a text is never normalised.

    Raises:
        ArtefactError: `learned_as` of tokenizer_config.json is none that an export writes.
    """
    trainer, normalizer = rebuilt.trainer_spec, rebuilt.normalizer_spec
    learned_as = settings.get("learned_as", {"split_by_unicode_script": True, "max_piece_length": 16})
    across, longest = learned_as["split_by_unicode_script"], learned_as["max_piece_length"]
    if type(across) is not bool or type(longest) is not int or not 1 <= longest <= 1 << 16:
        _refuse(where.replace("tokenizer.json", "tokenizer_config.json"), "learned_as", learned_as, "that of an export")

    trainer.model_type = BPE
    trainer.character_coverage = 0.9999
    trainer.max_sentence_length = 65536
    trainer.max_sentencepiece_length = longest
    trainer.split_by_unicode_script = across
    trainer.split_digits = True
    trainer.allow_whitespace_only_pieces = True
    trainer.byte_fallback = True
    for piece in rebuilt.pieces:
        if piece.type == CONTROL and piece.piece in SPECIAL_TOKENS[3:]:
            trainer.control_symbols.append(piece.piece)
        elif piece.type == USER_DEFINED:
            trainer.user_defined_symbols.append(piece.piece)
    for name, token_id in (("eos", 0), ("pad", SPECIAL_TOKENS.index(PAD)), ("unk", 2)):
        setattr(trainer, f"{name}_id", token_id)
        setattr(trainer, f"{name}_piece", SPECIAL_TOKENS[token_id])
    trainer.bos_id = -1

    normalizer.name = "identity"
    normalizer.precompiled_charsmap = b""
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False


def _set_options(rebuilt: Any, tokenizer_json: dict[str, Any], settings: Mapping[str, Any], where: str) -> None:
    """Sets the options of a model that somebody else trained, as far as its ids depend on them.

    Raises:
        ArtefactError: the normaliser or the pre-tokenizer has a step that SentencePiece lacks; names it.
    """
    trainer, normalizer = rebuilt.trainer_spec, rebuilt.normalizer_spec
    pieces = [piece.piece for piece in rebuilt.pieces]
    trainer.model_type = BPE
    trainer.byte_fallback = True

    # A model has a beginning of sentence here only if it opens every text.
    names = {name: _text_of(settings, f"{name}_token") for name in ("bos", "eos", "pad")}
    opening = [step["SpecialToken"]["id"] for step in _template(tokenizer_json) if "SpecialToken" in step]
    if names["bos"] not in opening and settings.get("add_bos_token") is not True:
        names["bos"] = ""
    for name, text in names.items():
        is_piece = text in pieces
        setattr(trainer, f"{name}_id", pieces.index(text) if is_piece else -1)
        setattr(trainer, f"{name}_piece", text if is_piece else NO_PIECE)
    trainer.unk_id = next(number for number, piece in enumerate(rebuilt.pieces) if piece.type == UNKNOWN)
    trainer.unk_piece = pieces[trainer.unk_id]

    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    for step in _steps(tokenizer_json, "normalizer"):
        kind = step.get("type")
        (pattern_kind, pattern) = next(iter((step.get("pattern") or {"": ""}).items()))
        words = (kind, pattern_kind, pattern, step.get("content"))
        if kind == "Precompiled":
            normalizer.name = "of the file"
            normalizer.precompiled_charsmap = b64decode(step["precompiled_charsmap"])
        elif words == DUMMY_PREFIX or (kind, step.get("prepend")) == ("Prepend", SPACE):
            normalizer.add_dummy_prefix = True
        elif words in REMOVED_SPACES:
            normalizer.remove_extra_whitespaces = True
        elif words != SPACES:
            _refuse(where, "normalizer", step, "the steps of SentencePiece")
    for step in _steps(tokenizer_json, "pre_tokenizer"):
        kind = step.get("type")
        if kind == "Metaspace" and step.get("split") is False:
            normalizer.add_dummy_prefix |= step.get("prepend_scheme", "always") != "never"
        elif kind != "Split":
            _refuse(where, "pre_tokenizer", step, "the steps of SentencePiece")


def _check_same_ids(tokenizer_json: dict[str, Any], rebuilt: Any, content: bytes, where: str) -> None:
    """Refuses a model that encodes a probe, and a text of its pieces, otherwise than the file does.

    Raises:
        ArtefactError: they differ.
        UserError: the package `tokenizers` is not installed.
    """
    # Special tokens that a text spells are text here; whatever else the file adds is found in text by both.
    special = {number for number, piece in enumerate(rebuilt.pieces) if piece.type in (CONTROL, UNKNOWN)}
    tokens = [token | {"special": token["id"] in special} for token in tokenizer_json.get("added_tokens") or []]
    plain = tokenizer_json | {"truncation": None, "padding": None, "added_tokens": tokens}
    theirs, ours = json_tokenizer(json.dumps(plain), where), SentencePieceModel(content, where)
    theirs.encode_special_tokens = True

    learned = [piece.piece.replace(SPACE, " ") for piece in rebuilt.pieces if piece.type == NORMAL]
    step = 1 + sum(map(len, learned)) // MOST_CHARACTERS
    for text in (PROBE, "".join(learned[::step]).strip()):
        their_ids, our_ids = theirs.encode(text, add_special_tokens=False).ids, ours.encode(text)
        if their_ids != our_ids:
            pairs = zip(their_ids, our_ids, strict=False)
            index = next((index for index, (a, b) in enumerate(pairs) if a != b), len(our_ids))
            raise ArtefactError(
                f"{where}: SentencePiece gives other ids than this file, from token {index} of a probe on: put the "
                "tokenizer.model that the file was made of beside it"
            )


def _steps(tokenizer_json: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Returns the steps of the normaliser or the pre-tokenizer, which is a sequence or one of them."""
    outer = tokenizer_json.get(key)
    if outer is None:
        return []
    return outer.get("normalizers", outer.get("pretokenizers", [outer]))


def _template(tokenizer_json: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what the post-processor puts around a text: a list of tokens, and the text."""
    processor = tokenizer_json.get("post_processor") or {}
    processors = processor.get("processors", [processor])
    return [step for part in processors for step in part.get("single", []) if isinstance(step, dict)]


def _text_of(settings: Mapping[str, Any], name: str) -> str:
    """Returns the text of a special token in tokenizer_config.json, where older versions write an object; else ''."""
    token = settings.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _refuse(where: str, key: str, value: Any, accepted: str) -> NoReturn:
    raise ArtefactError(
        f"{where}: {key}={shown_value(value)}: expected {accepted}: or put the tokenizer.model that the file was made "
        "of beside it"
    )
