"""A tokenizer as llama.cpp holds it: the keys `tokenizer.ggml.*` of a GGUF file. Needs the extra `gguf`.

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
from typing import Any

from dist_lm.errors import ArtefactError
from dist_lm.tokenizer.symbols import SPACE
from dist_lm.tokenizer.tokenizer import NO_PIECE, Tokenizer, sentencepiece_proto

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = (
    1,
    2,
    3,
    4,
    5,
)  # token types of GGUF; those of SentencePiece are the same
BPE = 2  # TrainerSpec.ModelType

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Steps of a pre-tokenizer: its name in llama.cpp, and whether a word that is a piece is left whole (`ignore_merges`)
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
    scores: list[float] | None  # of llama
    merges: list[str] | None  # of gpt2
    add_bos: bool  # before a text
    add_space_prefix: bool


def gguf_vocabulary(tokenizer: Tokenizer, content: bytes) -> GGUFVocabulary:
    """The vocabulary in `content`, the file of `tokenizer`.

    Raises:
        ArtefactError: llama.cpp has no tokenizer that gives its ids; names the option.
    """
    return _byte_level(content, tokenizer.name) if content.lstrip()[:1] == b"{" else _sentencepiece(tokenizer, content)


def _sentencepiece(tokenizer: Tokenizer, content: bytes) -> GGUFVocabulary:
    model = sentencepiece_proto(content)
    if model.trainer_spec.model_type != BPE:
        raise ArtefactError(
            f"{tokenizer.name}: model_type={model.trainer_spec.model_type}: llama.cpp reads bpe (2) alone"
        )
    if model.normalizer_spec.precompiled_charsmap or (
        model.normalizer_spec.remove_extra_whitespaces and not tokenizer.is_trained
    ):
        raise ArtefactError(f"{tokenizer.name}: the normaliser {model.normalizer_spec.name} is not one of llama.cpp")
    tokens, types = [piece.piece for piece in model.pieces], [piece.type for piece in model.pieces]
    if tokenizer.is_trained:
        # the marks that are no special tokens in the Hugging Face folder, so that parsers of text see them
        types = [
            USER_DEFINED if kind == CONTROL and not token.startswith("<|") else kind
            for token, kind in zip(tokens, types, strict=True)
        ]
    tokens = [
        token.replace(SPACE, " ") if kind == USER_DEFINED else token for token, kind in zip(tokens, types, strict=True)
    ]
    return GGUFVocabulary(
        "llama",
        "default",
        tokens,
        types,
        [piece.score for piece in model.pieces],
        None,
        add_bos=tokenizer.is_trained or tokenizer.opening.first != tokenizer.eot_id,
        add_space_prefix=model.normalizer_spec.add_dummy_prefix,
    )


def _byte_level(content: bytes, name: str) -> GGUFVocabulary:
    import tokenizers

    value = json.loads(content)
    pre, whole_words = _pre_tokenizer(value, name)
    if bool(value["model"].get("ignore_merges")) != whole_words:
        raise ArtefactError(
            f"{name}: ignore_merges={not whole_words}: the pre-tokenizer {pre} of llama.cpp has {whole_words}"
        )
    ids: dict[str, int] = dict(value["model"]["vocab"])
    size = 1 + max([*ids.values(), *(token["id"] for token in value["added_tokens"])])
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for token, number in ids.items():
        tokens[number], types[number] = token, NORMAL
    for added in value["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in value["model"]["merges"]]
    add_bos = len(tokenizers.Tokenizer.from_str(content.decode()).encode("").ids) > 0
    return GGUFVocabulary("gpt2", pre, tokens, types, None, merges, add_bos, add_space_prefix=False)


def tokenizer_file(values: Mapping[str, Any], place: str) -> tuple[bytes, str]:
    """The tokenizer in the keys of a GGUF file: content and name of a file that gives the ids of llama.cpp.

    Raises:
        ArtefactError: it is of another kind; names the key.
    """
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in values.items()}
    if found.get("model") == "gpt2":
        return _tokenizer_json(found, place), "tokenizer.json"
    if found.get("model") == "llama":
        return _tokenizer_model(found), "tokenizer.model"
    raise ArtefactError(f"{place}: tokenizer.ggml.model={found.get('model')}: expected gpt2 or llama")


def _tokenizer_json(found: Mapping[str, Any], place: str) -> bytes:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    steps = {pre: (kinds, whole_words) for kinds, (pre, whole_words) in PRE_TOKENIZERS.items()}
    if found.get("pre") not in steps:
        raise ArtefactError(f"{place}: tokenizer.ggml.pre={found.get('pre')}: expected one of {', '.join(steps)}")
    kinds, whole_words = steps[found["pre"]]
    made = {
        "ByteLevel regex": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "ByteLevel": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "Digits": lambda: pre_tokenizers.Digits(individual_digits=True),
    }
    texts, types = found["tokens"], found["token_type"]
    kept = {text: number for number, text in enumerate(texts) if types[number] != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in found["merges"]]
    tokenizer: Any = Tokenizer(models.BPE(kept, merges, ignore_merges=whole_words))
    parts = [
        made[kind]() if kind in made else pre_tokenizers.Split(Regex(kind.removeprefix("Split ")), "isolated")
        for kind in kinds
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        special = kind == CONTROL
        add([AddedToken(text, normalized=False, special=special) for text, n in kept.items() if types[n] == kind])
    if found.get("add_bos_token"):
        first = texts[found["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, found["bos_token_id"])]
        )
    return tokenizer.to_str(pretty=True).encode()


def _tokenizer_model(found: Mapping[str, Any]) -> bytes:
    model = sentencepiece_proto(b"")
    for text, score, kind in zip(found["tokens"], found["scores"], found["token_type"], strict=True):
        model.pieces.add(piece=text.replace(" ", SPACE), score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = BPE, True
    model.trainer_spec.vocab_size = len(found["tokens"])
    # ids that the file lacks are -1: no such token
    model.trainer_spec.unk_id = found["token_type"].index(UNKNOWN) if UNKNOWN in found["token_type"] else -1
    for name, number in (
        ("bos", found.get("bos_token_id", -1) if found.get("add_bos_token", True) else -1),
        ("eos", found.get("eos_token_id", -1)),
        ("pad", found.get("padding_token_id", -1)),
    ):  # the processor looks for the piece
        setattr(model.trainer_spec, f"{name}_id", number)
        setattr(model.trainer_spec, f"{name}_piece", model.pieces[number].piece if number >= 0 else NO_PIECE)
    model.normalizer_spec.name, model.normalizer_spec.add_dummy_prefix = "identity", found.get("add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString(deterministic=True)


def _pre_tokenizer(value: dict[str, Any], name: str) -> tuple[str, bool]:
    outer = value.get("pre_tokenizer") or {}
    parts: Sequence[dict[str, Any]] = outer.get("pretokenizers", [outer])
    kinds = tuple(_kind(part) for part in parts)
    if kinds not in PRE_TOKENIZERS:
        raise ArtefactError(
            f"{name}: pre_tokenizer {', '.join(kinds)}: llama.cpp has no name for it that is known here"
        )
    return PRE_TOKENIZERS[kinds]


def _kind(part: dict[str, Any]) -> str:
    """A step of a pre-tokenizer in words, with the options that change ids."""
    kind = str(part.get("type"))
    if kind == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
        return f"Split {part['pattern'].get('Regex')}"
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "ByteLevel regex" if part.get("use_regex", True) else "ByteLevel"
    if kind == "Digits" and part.get("individual_digits"):
        return "Digits"
    return json.dumps(part, sort_keys=True)
