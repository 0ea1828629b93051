"""Writes a tokenizer and the chat template as a Hugging Face folder, with the same ids. Needs the extra `hf`.

An existing `tokenizer.json` is written as it came, and so is an existing SentencePiece model. The rest is about ours:

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
from typing import Any

import sentencepiece

from dist_lm.errors import UserError
from dist_lm.storage import durable
from dist_lm.tokenizer.symbols import END_OF_TEXT, SPACE, UNKNOWN
from dist_lm.tokenizer.tokenizer import USER_DEFINED, Tokenizer, sentencepiece_proto


def save_hf_tokenizer(model_path: Path, folder: Path, chat_template: str) -> None:
    """Writes a tokenizer into `folder`, for `transformers.AutoTokenizer.from_pretrained(folder)`.

    A tokenizer that stage tokenizer trained is converted to `tokenizer.json`. The file of an imported tokenizer is
    copied under its own name: `tokenizer.json`, or `tokenizer.model` for a SentencePiece model. Beside it are written
    `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`. The folder is made if it is missing,
    and files of these names are replaced.

    Args:
        chat_template: Jinja text. If the tokenizer has kept the template of an imported model, this text is written
            unchanged. Otherwise the tokenizer's first token is written wherever the text has our end-of-text.

    Raises:
        ArtefactError: `model_path` is missing or is no tokenizer.
        UserError: the package `tokenizers` is needed and not installed.
        OSError: a file cannot be written.
    """
    tokenizer = Tokenizer.load(model_path)
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token": tokenizer.first_token.id, "eos_token": tokenizer.eot_id, "pad_token": tokenizer.pad_id}
    if UNKNOWN in tokenizer.special_ids:
        ids["unk_token"] = tokenizer.special_ids[UNKNOWN]
    special_tokens = dict(zip(ids, tokenizer.pieces(ids.values()), strict=True))

    content = model_path.read_bytes()
    if tokenizer.is_trained:
        fast_tokenizer = fast_tokenizer_json(sentencepiece.SentencePieceProcessor(model_proto=content))
        durable.write_bytes(folder / "tokenizer.json", fast_tokenizer.encode())
    else:
        durable.write_bytes(folder / model_path.name, content)

    if tokenizer.kept_template:
        special_tokens |= dict(tokenizer.kept_template.special_tokens)
    else:
        # Our template opens a conversation with our end-of-text; this tokenizer may open texts with another token.
        chat_template = chat_template.replace(END_OF_TEXT, special_tokens["bos_token"])
    durable.write_text(folder / "chat_template.jinja", chat_template)
    durable.write_json(folder / "special_tokens_map.json", special_tokens)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if model_path.suffix == ".model":
        settings |= _sentencepiece_settings(tokenizer, content)
    durable.write_json(folder / "tokenizer_config.json", special_tokens | settings)


def _sentencepiece_settings(tokenizer: Tokenizer, content: bytes) -> dict[str, Any]:
    """Returns the keys of tokenizer_config.json that a SentencePiece model needs besides its pieces.

    transformers keeps keys that it does not know, so `learned_as` is in a folder that it saves, and the import of that
    folder writes the same `tokenizer.model` (`sentencepiece_json`).
    """
    if not tokenizer.is_trained:
        # transformers does not look into the model for this.
        return {"add_bos_token": bool(tokenizer.first_ids)}
    trainer = sentencepiece_proto(content).trainer_spec
    longest, across = trainer.max_sentencepiece_length, trainer.split_by_unicode_script
    return {"learned_as": {"max_piece_length": longest, "split_by_unicode_script": across}}


def fast_tokenizer_json(processor: sentencepiece.SentencePieceProcessor) -> str:
    """Returns the content of a `tokenizer.json` with the ids of a model of `train_tokenizer`.

    It puts end-of-text before a text, unless the caller turns special tokens off.

    Raises:
        UserError: the package `tokenizers` is not installed.
    """
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    except ImportError as error:
        raise UserError("a Hugging Face tokenizer needs the package tokenizers: pip install 'dist_lm[hf]'") from error

    texts = [processor.id_to_piece(token_id).replace(SPACE, " ") for token_id in range(processor.get_piece_size())]
    mark_ids, symbol_ids, learned_ids = _ids_by_kind(processor)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: token_id for token_id, text in enumerate(texts)},
            merges=list(_merges([texts[token_id] for token_id in learned_ids])),
            unk_token=texts[processor.unk_id()],
            byte_fallback=True,
        )
    )
    # Tokens with `normalized` (normalisation changes nothing here) are looked for second, in the text between marks.
    # In one search with the marks, a symbol that begins inside the spelling of a mark would be missed.
    tokenizer.add_tokens([AddedToken(texts[token_id], normalized=True, special=False) for token_id in symbol_ids])
    for token_id in mark_ids:
        token = AddedToken(texts[token_id], normalized=False, special=texts[token_id].startswith("<|"))
        if token.special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])

    # A piece may be one byte of a character, so bytes are joined before they are decoded.
    first_token = texts[processor.eos_id()]
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first_token} $A",
        pair=f"{first_token} $A $B:1",
        special_tokens=[(first_token, processor.eos_id())],
    )
    return tokenizer.to_str(pretty=True)


def _ids_by_kind(processor: sentencepiece.SentencePieceProcessor) -> tuple[list[int], list[int], list[int]]:
    """Returns the ids of special tokens, of user-defined symbols, and of learned pieces.

    SentencePiece orders a vocabulary as special tokens, symbols, 256 bytes, learned pieces (best first). Tokens that
    were added later follow.
    """
    ids = range(processor.get_piece_size())
    special_ids = [token_id for token_id in ids if processor.is_control(token_id) or processor.is_unknown(token_id)]
    first_byte = next(token_id for token_id in ids if processor.is_byte(token_id))
    model = sentencepiece_proto(processor.serialized_model_proto())
    symbol_ids = [token_id for token_id in ids if model.pieces[token_id].type == USER_DEFINED]
    added_ids = {*special_ids, *symbol_ids}
    learned_ids = [token_id for token_id in range(first_byte + 256, len(ids)) if token_id not in added_ids]
    return special_ids, symbol_ids, learned_ids


def _merges(learned: list[str]) -> Iterator[tuple[str, str]]:
    """Yields every pair of learned pieces that makes a learned piece, in the order that SentencePiece prefers."""
    # SentencePiece keeps no merges, but it learned each piece by joining two earlier ones.
    pieces = set(learned)
    for piece in learned:
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                yield piece[:cut], piece[cut:]
