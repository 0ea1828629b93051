"""A tokenizer as a Hugging Face folder with identical ids, and with the chat template. Needs the extra `hf`.

A given `tokenizer.json` is written as it came, and so is a SentencePiece model of others. The rest is about ours:

The pieces hold plain spaces, not U+2581, so a literal U+2581 is a character without a piece and becomes its bytes, as
in `dist_lm.tokenizer`. What a user of the folder should know:

- `tokenizer(text).input_ids` begins with end-of-text, as a document of ours does; with `add_special_tokens=False` it is
  what `Tokenizer.encode` gives.
- A text that spells a mark becomes that mark, as `apply_chat_template` needs. `split_special_tokens=True` turns this
  off for the marks in `<|...|>`. `<tools>`, `<tool_call>` and `<tool_response>` are not special tokens, so that parsers
  of decoded text see them, and are always read as marks. Only `dist_lm.chat` gives ids in which no text forges a mark.
"""

from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from dist_lm.errors import UserError
from dist_lm.storage import durable
from dist_lm.tokenizer.symbols import END_OF_TEXT, SPACE, UNKNOWN
from dist_lm.tokenizer.tokenizer import Tokenizer


def save_hf_tokenizer(model_path: Path, folder: Path, chat_template: str) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja` into
    `folder`, for `transformers.AutoTokenizer.from_pretrained(folder)`. `chat_template`: see `chat.template`.

    A SentencePiece model of others is written as `tokenizer.model` instead.

    Raises:
        ArtefactError: `model_path` is missing or is no tokenizer.
        UserError: the package `tokenizers` is not installed.
    """
    tokenizer = Tokenizer.load(model_path)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"bos_token": tokenizer.opening.first, "eos_token": tokenizer.eot_id, "pad_token": tokenizer.pad_id}
    if UNKNOWN in tokenizer.special_ids:
        names["unk_token"] = tokenizer.special_ids[UNKNOWN]
    special = dict(zip(names, tokenizer.pieces(names.values()), strict=True))
    content = model_path.read_bytes()
    if tokenizer.is_trained:
        content = fast_tokenizer_json(sentencepiece.SentencePieceProcessor(model_proto=content)).encode()
        durable.write_bytes(folder / "tokenizer.json", content)
    else:
        durable.write_bytes(folder / model_path.name, content)
    if kept := tokenizer.kept_template:
        special |= dict(kept.special_tokens)
    else:
        chat_template = chat_template.replace(END_OF_TEXT, special["bos_token"])
    durable.write_text(folder / "chat_template.jinja", chat_template)
    durable.write_json(folder / "special_tokens_map.json", special)
    durable.write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )


def fast_tokenizer_json(processor: sentencepiece.SentencePieceProcessor) -> str:
    """The content of `tokenizer.json`."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    except ImportError as error:
        raise UserError("a Hugging Face tokenizer needs the package tokenizers: pip install 'dist_lm[hf]'") from error
    texts = [processor.id_to_piece(number).replace(SPACE, " ") for number in range(processor.get_piece_size())]
    marks, symbols, learned = _kinds(processor)
    unknown, opening = texts[processor.unk_id()], texts[processor.eos_id()]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: number for number, text in enumerate(texts)},
            merges=list(_merges([texts[number] for number in learned])),
            unk_token=unknown,
            byte_fallback=True,
        )
    )
    # Tokens with `normalized` (normalisation changes nothing here) are looked for second, in the text between marks.
    # In one search with the marks, a symbol that begins inside the spelling of a mark would be missed.
    tokenizer.add_tokens([AddedToken(texts[number], normalized=True, special=False) for number in symbols])
    for number in marks:
        token = AddedToken(texts[number], normalized=False, special=texts[number].startswith("<|"))
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A",
        pair=f"{opening} $A $B:1",
        special_tokens=[(opening, processor.eos_id())],
    )
    return tokenizer.to_str(pretty=True)


def _kinds(processor: sentencepiece.SentencePieceProcessor) -> tuple[list[int], range, range]:
    """Ids of special tokens, of user-defined symbols, and of learned pieces.

    SentencePiece orders a vocabulary as special tokens, symbols, 256 bytes, learned pieces (best first).
    """
    numbers = range(processor.get_piece_size())
    special = [n for n in numbers if processor.is_control(n) or processor.is_unknown(n)]
    first_byte = next(n for n in numbers if processor.is_byte(n))
    return special, range(len(special), first_byte), range(first_byte + 256, len(numbers))


def _merges(learned: list[str]) -> Iterator[tuple[str, str]]:
    """Every pair of learned pieces that makes a learned piece, in the order in which SentencePiece prefers them."""
    known = set(learned)
    for piece in learned:
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in known and piece[cut:] in known:
                yield piece[:cut], piece[cut:]
