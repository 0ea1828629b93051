"""The files of a model by their content: configuration, tokenizer, chat template, header of weights.

These functions run in the process with limits (`dist_lm.interop.snapshot_files.parsed`), so their arguments and results
are JSON values and bytes. Every error is one line that names the file and, where there is one, the field.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeGuard

from dist_lm.errors import ArtefactError, shown_value
from dist_lm.interop import sentencepiece_json
from dist_lm.interop.architectures import model_of
from dist_lm.tokenizer import byte_level
from dist_lm.tokenizer.tokenizer import (
    SentencePieceModel,
    Vocabulary,
    read_vocabulary,
    sentencepiece_proto,
    sentencepiece_with_marks,
    sentencepiece_without_first_token,
)

MOST_TENSORS = 1 << 17  # most tensors of a file; more would be work for the process that asks
ITEM_BYTES = {  # https://github.com/huggingface/safetensors/blob/main/README.md
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}


def json_object(content: bytes | None, where: str) -> dict[str, Any]:
    """Returns the JSON object in the content of a file; an empty one without a file.

    Raises:
        ArtefactError: the content is no JSON, is nested too deeply, or holds another value than an object.
    """
    if content is None:
        return {}
    try:
        value = json.loads(content.decode())
    except RecursionError as error:
        raise ArtefactError(f"{where}: no JSON (it is nested too deeply)") from error
    except ValueError as error:
        raise ArtefactError(f"{where}: no JSON ({error}): copy the model again") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{where}: expected a JSON object, not a {type(value).__name__}")
    return value


def described_model(content: bytes, name: str, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (options of `ModelConfig`, fields of `Architecture`) of the model that a config.json describes.

    Raises:
        ArtefactError: see `model_of`; or the content is no JSON object.
    """
    model, architecture = model_of(json_object(content, where), name, where)
    return asdict(model), asdict(architecture)


# --- weights ---


def weight_files(content: bytes, where: str) -> list[str]:
    """Returns the names of the files that hold weights, by the content of model.safetensors.index.json, sorted.

    Raises:
        ArtefactError: the content is no such index.
    """
    weight_map = json_object(content, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtefactError(f"{where}: weight_map={shown_value(weight_map)}: expected an object with names of files")
    for tensor, file in weight_map.items():
        # The index comes from outside: a name may not lead out of the folder.
        if not isinstance(file, str) or "/" in file or "\0" in file or file in ("", ".", ".."):
            raise ArtefactError(f"{where}: weight_map.{shown_value(tensor)}={shown_value(file)}: expected a file name")
    return sorted(set(weight_map.values()))


def tensors_of_header(header: bytes, data_bytes: int, where: str) -> list[tuple[str, str, list[int], int]]:
    """Returns (name, dtype, shape, byte offset in the data) of every tensor in the header of a safetensors file.

    Args:
        data_bytes: size of the file behind the header.

    Raises:
        ArtefactError: names the tensor that has no known dtype, no shape, or other bytes than these say; or whose
            bytes are those of another tensor, or lie behind the end of the file.
    """
    entries = _without_doubles(header, where)
    if len(entries) > MOST_TENSORS:
        raise ArtefactError(f"{where}: the header has {len(entries)} tensors: expected at most {MOST_TENSORS}")
    tensors: list[tuple[str, str, list[int], int]] = []
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        if name == "__metadata__":
            if not _are_texts(entry):
                raise ArtefactError(f"{where}: __metadata__={shown_value(entry)}: expected an object with texts")
            continue

        field = f"{where}: tensor {shown_value(name)}"
        if not isinstance(entry, dict):
            raise ArtefactError(f"{field}: expected an object, not {shown_value(entry)}")
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise ArtefactError(f"{field}: dtype={shown_value(dtype)}: expected one of {', '.join(ITEM_BYTES)}")
        if not _are_sizes(shape):
            raise ArtefactError(f"{field}: shape={shown_value(shape)}: expected a list of sizes")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise ArtefactError(f"{field}: data_offsets={shown_value(offsets)}: expected two byte offsets")

        # Sizes are bounded by the file before they are multiplied, since a product of many has no end.
        expected_bytes = ITEM_BYTES[dtype]
        for size in shape:
            expected_bytes = min(expected_bytes * size, 1 << 63)
        begin, end = offsets
        if end - begin != expected_bytes:
            raise ArtefactError(
                f"{field}: data_offsets={shown_value(offsets)}: expected {expected_bytes} bytes by dtype and shape"
            )
        tensors.append((name, dtype, shape, begin))
        spans.append((begin, end, name))

    # The format has no holes, so the tensors in their order must meet.
    position = 0
    for begin, end, name in sorted(spans):
        field = f"{where}: tensor {shown_value(name)}: data_offsets={[begin, end]}"
        if begin != position:
            problem = (
                "the bytes before are those of another tensor" if begin < position else "no tensor has the bytes before"
            )
            raise ArtefactError(f"{field}: {problem}: expected {position} as the beginning")
        if end > data_bytes:
            raise ArtefactError(f"{field}: cut short: the file has {data_bytes} bytes of weights; copy it again")
        position = end
    if position != data_bytes:
        raise ArtefactError(f"{where}: {data_bytes - position} bytes at the end belong to no tensor: copy it again")
    return tensors


def _without_doubles(header: bytes, where: str) -> dict[str, Any]:
    """Returns the JSON object of a header.

    Raises:
        ArtefactError: it is none, or has a key twice.
    """

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for index, name in enumerate(names) if name in names[:index])
            raise ArtefactError(f"{where}: the header has {shown_value(double)} twice")
        return entries

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        value = json.loads(header.decode(), object_pairs_hook=to_object, parse_constant=refuse)
        # Python reads half of a surrogate pair, which safetensors refuses.
        if b"\\u" in header:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ArtefactError(f"{where}: not a safetensors file (its header is nested too deeply)") from error
    except ArtefactError:
        raise
    except ValueError as error:
        raise ArtefactError(f"{where}: not a safetensors file (its header is no JSON: {error})") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{where}: not a safetensors file (its header is no object)")
    return value


def _are_texts(metadata: Any) -> bool:
    """Returns whether safetensors reads this as the metadata of a file, which it may leave out."""
    if metadata is None:
        return True
    return isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


# --- tokenizer and chat template ---


def pieces_in(content: bytes, where: str) -> int:
    """Returns the number of pieces of the tokenizer in the content of a file.

    Raises:
        ArtefactError: it is none.
        UserError: the package `tokenizers` is needed and not installed.
    """
    return read_vocabulary(content, where).vocab_size


def fitted_tokenizer(
    folder: str, rows: int, tokenizers: list[str], settings: bytes | None, added_tokens: bytes | None, *contents: bytes
) -> tuple[bytes, str]:
    """Returns the content of a tokenizer with exactly `rows` pieces, and the name of the file to store it in.

    The tokenizer opens texts as transformers does: `add_bos_token` of `settings` decides, else the file.

    Args:
        folder: path, for messages.
        rows: rows of the embedding. Rows without a piece get special tokens, which no text becomes: with the names
            that transformers adds to a SentencePiece model, else <|unused_N|>, where N is the token's id.
        tokenizers: names of the files with `contents`, at least one; the first one that is readable is taken.
        settings: content of tokenizer_config.json; None: there is no such file.
        added_tokens: content of added_tokens.json; None: there is no such file.
        contents: content of each file of `tokenizers`, in the same order.

    Raises:
        ArtefactError: no tokenizer is readable, `settings` or `added_tokens` is no JSON object or has a broken token,
            or the tokenizer has more pieces than the embedding has rows. A tokenizer that this project trained is
            refused if it has fewer, too.
        UserError: the package `tokenizers` is needed and not installed.
    """
    settings_path = f"{folder}/tokenizer_config.json"
    options = json_object(settings, settings_path)
    content, vocabulary, path = _readable_tokenizer(folder, dict(zip(tokenizers, contents, strict=True)), options)
    content = _with_first_token_of(options, content, vocabulary)
    pieces = vocabulary.vocab_size
    if pieces > rows or (vocabulary.is_trained and pieces < rows):
        raise ArtefactError(f"{path} has {pieces} pieces, the embedding has {rows} rows: not its tokenizer")

    # Embeddings are often larger than their tokenizer, and every id that a model can draw must have a name.
    unused = {token_id: f"<|unused_{token_id}|>" for token_id in range(pieces, rows)}
    if unused and isinstance(vocabulary, byte_level.ByteLevelModel):
        content = byte_level.with_marks(content, [*unused.values()], pieces)
    elif unused:
        names = {piece.piece for piece in sentencepiece_proto(content).pieces}
        added = json_object(added_tokens, f"{folder}/added_tokens.json")
        for token_id, name in _added_tokens(added, options, folder).items():
            if token_id in unused and name not in names:
                unused[token_id] = name
                names.add(name)
        content = sentencepiece_with_marks(content, [*unused.values()])

    # The caller reads the result outside of this process, so it must be read here once.
    if unused:
        read_vocabulary(content, path)
    return content, vocabulary.file_name


def _readable_tokenizer(
    folder: str, contents: Mapping[str, bytes], settings: Mapping[str, Any]
) -> tuple[bytes, Vocabulary, str]:
    """Returns the content of the first tokenizer that is readable, its vocabulary, and the path of its file.

    Args:
        folder: path, for messages.
        contents: by the names of the files.
        settings: tokenizer_config.json.

    Raises:
        ArtefactError: none is readable.
        UserError: the package `tokenizers` is needed and not installed.
    """
    # transformers writes a tokenizer.json of a SentencePiece model, too. If the model itself is there, it is taken.
    last = len(contents) - 1
    for number, (name, content) in enumerate(contents.items()):
        path = f"{folder}/{name}"
        try:
            return content, read_vocabulary(content, path), path
        except ArtefactError:
            if number == last and not sentencepiece_json.is_of_sentencepiece(content):
                raise

    content = sentencepiece_json.sentencepiece_of(content, settings, path)
    return content, read_vocabulary(content, path), path


def _with_first_token_of(settings: Mapping[str, Any], content: bytes, vocabulary: Vocabulary) -> bytes:
    """Returns the tokenizer, opening texts as transformers does: by `add_bos_token` of `settings`, else as the file.

    Args:
        settings: tokenizer_config.json; without `add_bos_token` nothing changes.
        content: the file of `vocabulary`; returned unchanged if it already opens texts so, or cannot.
    """
    add_bos = settings.get("add_bos_token")
    if isinstance(vocabulary, SentencePieceModel):
        if add_bos is False and vocabulary.first_id is not None:
            return sentencepiece_without_first_token(content)
        return content

    mark = settings.get("bos_token")
    if isinstance(mark, dict):
        mark = mark.get("content")
    if add_bos is True and vocabulary.first_id is None and isinstance(mark, str) and mark in vocabulary.special_ids:
        return byte_level.with_first_token(content, mark)
    return content


def _added_tokens(added: Mapping[str, Any], settings: Mapping[str, Any], folder: str) -> dict[int, str]:
    """Returns the texts of tokens that transformers adds to the file of a tokenizer, by id; empty texts are left out.

    Args:
        added: added_tokens.json, text -> id.
        settings: tokenizer_config.json, whose `added_tokens_decoder` replaces tokens of `added` with the same id.
        folder: path, for messages.

    Raises:
        ArtefactError: an id is no number, `added_tokens_decoder` is no object, or a token in it has no string as its
            content; the message names file and field.
    """
    names: dict[int, str] = {}
    for name, token_id in added.items():
        if type(token_id) is not int:
            raise ArtefactError(
                f"{folder}/added_tokens.json: {shown_value(name)}={shown_value(token_id)}: expected an id"
            )
        names[token_id] = name

    where = f"{folder}/tokenizer_config.json: added_tokens_decoder"
    decoder = settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise ArtefactError(f"{where}={shown_value(decoder)}: expected an object")
    for token_id, token in decoder.items():
        name = token.get("content") if isinstance(token, dict) else None
        if not token_id.isdecimal() or not token_id.isascii() or len(token_id) > 10 or not isinstance(name, str):
            raise ArtefactError(f"{where}.{shown_value(token_id)}={shown_value(token)}: expected a token with content")
        names[int(token_id)] = name
    return {token_id: name for token_id, name in names.items() if name}


def template_in(content: bytes | None, settings: bytes | None, folder: str) -> str:
    """Returns the chat template, from its own file or from tokenizer_config.json; empty without one.

    Of several templates with names it is the one called default.

    Args:
        content: that of chat_template.jinja.
        settings: that of tokenizer_config.json.
        folder: path, for messages.

    Raises:
        ArtefactError: `settings` is no JSON, or a template is not Unicode.
    """
    where = f"{folder}/chat_template.jinja"
    if content is not None:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ArtefactError(f"{where}: byte {error.start} is not UTF-8: convert the file") from error

    where = f"{folder}/tokenizer_config.json"
    template = json_object(settings, where).get("chat_template")
    if isinstance(template, list):  # several templates with names
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str):
        return ""
    try:
        template.encode()
    except UnicodeEncodeError as error:
        raise ArtefactError(f"{where}: chat_template: character {error.start} is a lone surrogate") from error
    return template


def special_tokens_in(settings: bytes | None, special_tokens: bytes | None, folder: str) -> dict[str, str]:
    """Returns the texts of special tokens that chat templates may use: bos_token, eos_token and others, by name.

    tokenizer_config.json comes before special_tokens_map.json; without both files the result is empty.

    Raises:
        ArtefactError: one of the files is no JSON.
    """
    texts = {}
    options = json_object(special_tokens, f"{folder}/special_tokens_map.json")
    options |= json_object(settings, f"{folder}/tokenizer_config.json")
    for name, text in options.items():
        if isinstance(text, dict):  # older files have objects
            text = text.get("content")
        if name.endswith("_token") and isinstance(text, str):
            texts[name] = text
    return texts
