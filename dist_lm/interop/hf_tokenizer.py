"""Our SentencePiece model as a Hugging Face fast tokenizer with identical ids. Needs the extra `hf`.

Its pieces hold plain spaces, not U+2581, so a literal U+2581 is one more character without a piece and falls
to its bytes, as it does in `dist_lm.tokenizer`. What a user of the folder should know:

- A call adds the end-of-text that opens every document: `tokenizer(text).input_ids` is what `encode_document`
  gives; with `add_special_tokens=False` it is what `encode` gives.
- Text that spells a special token stays text (`split_special_tokens` is on; ours has no other mode). Whoever
  renders a conversation with special tokens in it passes `split_special_tokens=False`. A program that reads
  `tokenizer.json` without its configuration must set `encode_special_tokens` for the same.
"""

from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from dist_lm.errors import ArtefactError, UserError
from dist_lm.storage import durable

SPACE = "\u2581"


def save_hf_tokenizer(model_path: Path, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into `folder`, for
    `transformers.AutoTokenizer.from_pretrained(folder)`.

    Raises:
        ArtefactError: `model_path` is missing or is no SentencePiece model.
        UserError: the package `tokenizers` is not installed.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model_path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise ArtefactError(f"{model_path}: no usable tokenizer ({error}): train it with stage=tokenizer") from error
    folder.mkdir(parents=True, exist_ok=True)
    names = {"bos_token": processor.eos_id(), "eos_token": processor.eos_id()}
    names |= {"pad_token": processor.pad_id(), "unk_token": processor.unk_id()}
    special = {name: processor.id_to_piece(number) for name, number in names.items()}
    durable.write_text(folder / "tokenizer.json", fast_tokenizer_json(processor))
    durable.write_json(folder / "special_tokens_map.json", special)
    durable.write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )


def fast_tokenizer_json(processor: sentencepiece.SentencePieceProcessor) -> str:
    """The content of `tokenizer.json`."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    except ImportError as error:
        raise UserError("a Hugging Face tokenizer needs the package tokenizers: pip install 'dist_lm[hf]'") from error
    texts = [piece.replace(SPACE, " ") for piece in _pieces(processor)]
    special, symbols, learned = _kinds(processor)
    unknown, opening = texts[processor.unk_id()], texts[processor.eos_id()]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: number for number, text in enumerate(texts)},
            merges=list(_merges([texts[number] for number in learned])),
            unk_token=unknown,
            byte_fallback=True,
        )
    )
    # what is to be normalised (here: left as it is) is looked for second, in all of the text that special tokens leave;
    # in one search with them, a symbol that begins inside the spelling of one, as `>=` can, would be missed
    tokenizer.add_tokens([AddedToken(texts[number], normalized=True, special=False) for number in symbols])
    tokenizer.add_special_tokens([AddedToken(texts[number], normalized=False, special=True) for number in special])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A",
        pair=f"{opening} $A $B:1",
        special_tokens=[(opening, processor.eos_id())],
    )
    return tokenizer.to_str(pretty=True)


def _pieces(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    return [processor.id_to_piece(number) for number in range(processor.get_piece_size())]


def _kinds(processor: sentencepiece.SentencePieceProcessor) -> tuple[list[int], range, range]:
    """Ids of special tokens, of user-defined symbols, and of learned pieces.

    SentencePiece lays a vocabulary out as special tokens, symbols, 256 bytes, learned pieces (best first).
    """
    numbers = range(processor.get_piece_size())
    special = [n for n in numbers if processor.is_control(n) or processor.is_unknown(n)]
    first_byte = next(n for n in numbers if processor.is_byte(n))
    return special, range(len(special), first_byte), range(first_byte + 256, len(numbers))


def _merges(learned: list[str]) -> Iterator[tuple[str, str]]:
    """Every pair of learned pieces that makes a learned piece, those that SentencePiece prefers first."""
    known = set(learned)
    for piece in learned:
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in known and piece[cut:] in known:
                yield piece[:cut], piece[cut:]
