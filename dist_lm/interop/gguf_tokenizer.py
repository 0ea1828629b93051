"""Translates a tokenizer to the keys `tokenizer.ggml.*` of a GGUF file for llama.cpp, and back. Needs the extra `gguf`.

Spec: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer

llama.cpp gives the ids of our tokenizer, with these exceptions:

- A text that spells `<tools>`, `<tool_call>`, `<tool_response>` or their ends becomes that mark, as in the Hugging Face
  folder (`hf_tokenizer`).
- SentencePiece: a literal U+2581 is a space.
- `tokenizer.json`: the normaliser (NFC) is left out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from dist_lm.errors import ArtefactError, shown_value
from dist_lm.tokenizer.symbols import SPACE
from dist_lm.tokenizer.tokenizer import NO_PIECE, Tokenizer, read_vocabulary, sentencepiece_proto

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of GGUF; SentencePiece has the same
BPE = 2  # TrainerSpec.ModelType

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Steps of a pre-tokenizer -> its name in llama.cpp, and whether a word that is a piece stays whole (`ignore_merges`).
PRE_TOKENIZERS = {
    ("ByteLevel regex",): ("gpt-2", False),
    ("Digits", "ByteLevel regex"): ("smollm", False),
    (f"Split {_WORDS % '{1,3}'}", "ByteLevel"): ("llama-bpe", True),
    (f"Split {_WORDS % ''}", "ByteLevel"): ("qwen2", False),
}


@dataclass(frozen=True)
class GGUFVocabulary:
    """The values of the keys `tokenizer.ggml.*`."""

    model: str  # llama: SentencePiece's BPE; gpt2: byte-level BPE
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None  # for model llama
    merges: list[str] | None  # for model gpt2
    add_bos: bool  # whether a text begins with the token bos
    add_space_prefix: bool  # whether a text begins with a space


def gguf_vocabulary(tokenizer: Tokenizer, content: bytes) -> GGUFVocabulary:
    """Returns the vocabulary in `content`, the file of `tokenizer`. A `tokenizer.json` needs the package tokenizers.

    Raises:
        ArtefactError: llama.cpp has no tokenizer that gives its ids; names the option.
    """
    if content.lstrip()[:1] == b"{":
        return _byte_level(content, tokenizer.name)
    return _sentencepiece(tokenizer, content)


def _sentencepiece(tokenizer: Tokenizer, content: bytes) -> GGUFVocabulary:
    """Returns the vocabulary of a SentencePiece model, whose file is `content`.

    Raises:
        ArtefactError: the model is not BPE, or its normaliser changes text otherwise than llama.cpp does.
    """
    model = sentencepiece_proto(content)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != BPE:
        raise ArtefactError(f"{tokenizer.name}: model_type={trainer.model_type}: llama.cpp reads bpe (2) alone")
    removes_spaces = normalizer.remove_extra_whitespaces and not tokenizer.is_trained
    if normalizer.precompiled_charsmap or removes_spaces:
        raise ArtefactError(f"{tokenizer.name}: the normaliser {normalizer.name} is not one of llama.cpp")

    tokens: list[str] = []
    types: list[int] = []
    for piece in model.pieces:
        text, token_type = piece.piece, piece.type
        # These marks are no special tokens in the Hugging Face folder either, so that parsers of text see them.
        if tokenizer.is_trained and token_type == CONTROL and not text.startswith("<|"):
            token_type = USER_DEFINED

        # llama.cpp looks for user-defined tokens in the text before it writes spaces as U+2581.
        if token_type == USER_DEFINED:
            text = text.replace(SPACE, " ")
        tokens.append(text)
        types.append(token_type)
    return GGUFVocabulary(
        "llama",
        "default",
        tokens,
        types,
        [piece.score for piece in model.pieces],
        None,
        add_bos=tokenizer.is_trained or tokenizer.first_token.id != tokenizer.eot_id,
        add_space_prefix=normalizer.add_dummy_prefix,
    )


def _byte_level(content: bytes, name: str) -> GGUFVocabulary:
    """Returns the vocabulary of a `tokenizer.json`; messages call it `name`. Needs the package tokenizers.

    Ids without a token are named `[PADn]` and have type unused.

    Raises:
        ArtefactError: the pre-tokenizer, or its combination with `ignore_merges`, has no name in llama.cpp.
    """
    import tokenizers

    tokenizer_json = json.loads(content)
    model, added_tokens = tokenizer_json["model"], tokenizer_json["added_tokens"]
    pre, ignores_merges = _pre_tokenizer(tokenizer_json, name)
    if bool(model.get("ignore_merges")) != ignores_merges:
        raise ArtefactError(
            f"{name}: ignore_merges={not ignores_merges}: the pre-tokenizer {pre} of llama.cpp has {ignores_merges}"
        )

    # Ids without a token must have a name of their own, too.
    ids: dict[str, int] = dict(model["vocab"])
    size = 1 + max([*ids.values(), *(token["id"] for token in added_tokens)])
    tokens = [f"[PAD{token_id}]" for token_id in range(size)]
    types = [UNUSED] * size
    for token, token_id in ids.items():
        tokens[token_id] = token
        types[token_id] = NORMAL
    for added in added_tokens:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED

    # Newer files write a merge as a list of two pieces.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    add_bos = len(tokenizers.Tokenizer.from_str(content.decode()).encode("").ids) > 0
    return GGUFVocabulary("gpt2", pre, tokens, types, None, merges, add_bos, add_space_prefix=False)


def tokenizer_file(values: Mapping[str, Any], where: str) -> tuple[bytes, str]:
    """Returns the content and the name of a tokenizer file that gives the ids of llama.cpp.

    Args:
        values: the keys of a GGUF file.
        where: path of the GGUF file, for messages.

    Raises:
        ArtefactError: the tokenizer or its pre-tokenizer is of another kind; names the key.
        UserError: as `read_vocabulary`.
    """
    prefix = "tokenizer.ggml."
    keys = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    if keys.get("model") == "gpt2":
        _check_keys(keys, ("merges",), where)
        content, name = _tokenizer_json(keys, where), "tokenizer.json"
    elif keys.get("model") == "llama":
        _check_keys(keys, ("scores",), where)
        content, name = _tokenizer_model(keys), "tokenizer.model"
    else:
        model = shown_value(keys.get("model"))
        raise ArtefactError(f"{where}: {prefix}model={model}: expected gpt2 or llama")

    # The caller reads the result outside of the process with limits, so it must be read here once.
    read_vocabulary(content, f"{where}: {prefix}tokens")
    return content, name


def _check_keys(keys: Mapping[str, Any], lists: Sequence[str], where: str) -> None:
    """Refuses keys of a tokenizer that are missing, or have other types or lengths than llama.cpp writes.

    Args:
        keys: values of the keys `tokenizer.ggml.*`, by their last part.
        lists: further lists that the kind of the tokenizer needs: merges or scores.
        where: the GGUF file, for messages.

    Raises:
        ArtefactError: names the key.
    """

    def refuse(key: str, accepted: str) -> NoReturn:
        value = shown_value(keys.get(key))
        raise ArtefactError(f"{where}: tokenizer.ggml.{key}={value}: expected {accepted}")

    element_types = {"tokens": (str,), "token_type": (int,), "merges": (str,), "scores": (float,)}
    for key in ("tokens", "token_type", *lists):
        value = keys.get(key)
        if not isinstance(value, list) or any(type(element) not in element_types[key] for element in value):
            refuse(key, "a list of texts" if str in element_types[key] else "a list of numbers")

    size = len(keys["tokens"])
    if not size or len(set(keys["tokens"])) < size:
        refuse("tokens", "different texts")
    for key in ("token_type", *(key for key in lists if key == "scores")):
        if len(keys[key]) != size:
            refuse(key, f"as many numbers as tokens, {size}")
    if not all(NORMAL <= token_type <= BYTE for token_type in keys["token_type"]):
        refuse("token_type", f"numbers from {NORMAL} to {BYTE}")
    for key in ("bos_token_id", "eos_token_id", "padding_token_id"):
        token_id = keys.get(key, 0)
        if type(token_id) is not int or not 0 <= token_id < size:
            refuse(key, f"an id below {size}")
    for key in ("add_bos_token", "add_space_prefix"):
        if type(keys.get(key, True)) is not bool:
            refuse(key, "true or false")
    if "merges" in lists and any(merge.count(" ") != 1 for merge in keys["merges"]):
        refuse("merges", "pairs of pieces with a space between them")
    if "merges" in lists and keys.get("add_bos_token") and "bos_token_id" not in keys:
        refuse("bos_token_id", "an id, since add_bos_token is true")


def _tokenizer_json(keys: Mapping[str, Any], where: str) -> bytes:
    """Returns the content of a `tokenizer.json` that gives the ids of a byte-level BPE of llama.cpp.

    Args:
        keys: values of the keys `tokenizer.ggml.*`, by their last part.
        where: the GGUF file, for messages.

    Raises:
        ArtefactError: the pre-tokenizer is not in `PRE_TOKENIZERS`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    steps_of = {pre: (steps, ignores_merges) for steps, (pre, ignores_merges) in PRE_TOKENIZERS.items()}
    if not isinstance(keys.get("pre"), str) or keys["pre"] not in steps_of:
        pre = shown_value(keys.get("pre"))
        raise ArtefactError(f"{where}: tokenizer.ggml.pre={pre}: expected one of {', '.join(steps_of)}")
    steps, ignores_merges = steps_of[keys["pre"]]

    texts, types = keys["tokens"], keys["token_type"]
    vocabulary = {text: token_id for token_id, text in enumerate(texts) if types[token_id] != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in keys["merges"]]
    try:
        tokenizer: Any = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignores_merges))
    except Exception as error:  # the package raises plain Exception
        raise ArtefactError(f"{where}: tokenizer.ggml.merges: {shown_value(str(error))}") from None

    def pre_tokenizer(step: str) -> Any:
        if step == "Digits":
            return pre_tokenizers.Digits(individual_digits=True)
        if step.startswith("ByteLevel"):
            return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "ByteLevel regex")
        return pre_tokenizers.Split(Regex(step.removeprefix("Split ")), "isolated")

    # The file of llama.cpp has only the name of the pre-tokenizer, so its steps come from our table.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer(step) for step in steps])
    tokenizer.decoder = decoders.ByteLevel()

    for token_type, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        added = [text for text, token_id in vocabulary.items() if types[token_id] == token_type]
        add([AddedToken(text, normalized=False, special=token_type == CONTROL) for text in added])
    if keys.get("add_bos_token"):
        first_id = keys["bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{texts[first_id]} $A", special_tokens=[(texts[first_id], first_id)]
        )
    return tokenizer.to_str(pretty=True).encode()


def _tokenizer_model(keys: Mapping[str, Any]) -> bytes:
    """Returns the content of a `tokenizer.model` that gives the ids of a SentencePiece BPE of llama.cpp.

    Args:
        keys: values of the keys `tokenizer.ggml.*`, by their last part. Without `add_bos_token` or `add_space_prefix`
            they are on; a special token without a key is one that the model lacks.
    """
    model = sentencepiece_proto(b"")
    texts, types = keys["tokens"], keys["token_type"]
    for text, score, token_type in zip(texts, keys["scores"], types, strict=True):
        model.pieces.add(piece=text.replace(" ", SPACE), score=score, type=token_type)

    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = BPE
    trainer.byte_fallback = True
    trainer.vocab_size = len(texts)
    # SentencePiece writes -1 for a token that the model lacks. It looks for the others by their pieces.
    trainer.unk_id = types.index(UNKNOWN) if UNKNOWN in types else -1
    ids = {name: keys.get(f"{key}_token_id", -1) for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    if not keys.get("add_bos_token", True):
        ids["bos"] = -1
    for name, token_id in ids.items():
        piece = NO_PIECE
        if token_id >= 0:
            piece = model.pieces[token_id].piece
        setattr(trainer, f"{name}_id", token_id)
        setattr(trainer, f"{name}_piece", piece)

    normalizer.name = "identity"
    normalizer.add_dummy_prefix = keys.get("add_space_prefix", True)
    normalizer.remove_extra_whitespaces = False
    return model.SerializeToString(deterministic=True)


def _pre_tokenizer(tokenizer_json: dict[str, Any], name: str) -> tuple[str, bool]:
    """Returns the name of a pre-tokenizer in llama.cpp, and whether it goes with `ignore_merges`.

    Args:
        tokenizer_json: the whole file.
        name: the file, for messages.

    Raises:
        ArtefactError: its steps are not in `PRE_TOKENIZERS`.
    """
    outer = tokenizer_json.get("pre_tokenizer") or {}
    parts: Sequence[dict[str, Any]] = outer.get("pretokenizers", [outer])
    steps = tuple(_step(part) for part in parts)
    if steps not in PRE_TOKENIZERS:
        raise ArtefactError(
            f"{name}: pre_tokenizer {', '.join(steps)}: llama.cpp has no name for it that is known here"
        )
    return PRE_TOKENIZERS[steps]


def _step(part: dict[str, Any]) -> str:
    """Returns a step of a pre-tokenizer in words, with the options that change ids.

    A step that `PRE_TOKENIZERS` cannot have is returned as JSON, for the message.
    """
    step_type = str(part.get("type"))
    if step_type == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
        return f"Split {part['pattern'].get('Regex')}"
    if step_type == "ByteLevel" and not part.get("add_prefix_space"):
        if part.get("use_regex", True):
            return "ByteLevel regex"
        return "ByteLevel"
    if step_type == "Digits" and part.get("individual_digits"):
        return "Digits"
    return json.dumps(part, sort_keys=True)
