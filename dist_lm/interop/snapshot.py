"""Reads a model of transformers before it is imported: a folder that transformers saved, or a model of the hub.

`hf:FOLDER`, `hf:ORGANISATION/NAME` and `hf:ORGANISATION/NAME@REVISION` name one on the command line. Nothing here reads
weights.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dist_lm.config.corpus import HF
from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, UserError
from dist_lm.interop.architectures import Architecture, model_of
from dist_lm.storage import durable
from dist_lm.tokenizer import byte_level
from dist_lm.tokenizer.tokenizer import (
    SentencePieceModel,
    Vocabulary,
    read_vocabulary,
    sentencepiece_proto,
    sentencepiece_with_marks,
    sentencepiece_without_first_token,
)

CONFIG, INDEX, WHOLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
SMALL = ("*.json", "*.model", "*.jinja")  # the other files of a hub repository
WEIGHTS = "*.safetensors"


def name_of(source: str) -> str:
    """Returns the name of the run that an import on the way writes: that of the folder, or of the model on the hub.

    Characters that a name of a run cannot have become `-`; `model` if none is left. The hub is not asked.
    """
    text = source.removeprefix(HF)
    folder = Path(text).expanduser()
    # The name becomes that of a folder, so it must not begin with a dot or hold a separator.
    if folder.is_dir():
        name = folder.resolve().name
    else:
        name = text.partition("@")[0].rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name).lstrip("._-") or "model"


def folder_of(source: str, weights: bool = True) -> Path:
    """Returns the folder that `source` names; a model of the hub is fetched into huggingface_hub's cache.

    A folder of this machine comes before a model of the hub with the same name, and what it holds is not checked. Of a
    model of the hub the result is the folder of its commit.

    Args:
        source: with or without `hf:`.
        weights: whether to fetch the weights too.

    Raises:
        ArtefactError: there is no such folder, and the hub gives no model.
        UserError: huggingface_hub is not installed.
    """
    source = source.removeprefix(HF)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder

    hub_id = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", source)
    if not hub_id:
        raise ArtefactError(f"{source}: no such folder, and no id of the hub, such as HuggingFaceTB/SmolLM2-135M")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(f"{source}: the hub needs huggingface_hub: pip install huggingface_hub") from error
    # A repository may hold the weights in several formats; only safetensors are fetched.
    patterns = [*SMALL, WEIGHTS] if weights else [*SMALL]
    try:
        return Path(snapshot_download(hub_id[1], revision=hub_id[2], allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{source}: no such folder, and the hub gave no model ({reason})") from error


def model_in(folder: Path, name: str) -> tuple[ModelConfig, Architecture]:
    """Returns the model that the config.json of a folder describes, called `name`, and its architecture.

    Raises:
        ArtefactError: the file is missing or no JSON, or names an option that our model lacks.
    """
    return model_of(read_json(folder / CONFIG), name, str(folder / CONFIG))


def named_model(source: str) -> ModelConfig:
    """Returns the model that `source` names, with a head for tokens: stages choose the head themselves.

    A model of the hub is fetched, without its weights.

    Raises:
        ArtefactError, UserError: as `folder_of` and `model_in`.
    """
    model, _ = model_in(folder_of(source, weights=False), name_of(source))
    return replace(model, head="tokens")


def named_tokenizer(source: str) -> tuple[bytes, str]:
    """Returns the content of the tokenizer of the model that `source` names, as an import writes it, and its file name.

    A model of the hub is fetched, without its weights. The result is cached until a file changes.

    Raises:
        ArtefactError: there is no such model, it has an option that ours lacks, or no tokenizer fits its embedding.
        UserError: a package that is needed is not installed.
    """
    folder = folder_of(source, weights=False)
    rows = model_in(folder, name_of(source))[0].vocab_size
    paths = [folder / name for name in TOKENIZERS]
    return _tokenizer(folder, rows, tuple(path.stat().st_mtime_ns for path in paths if path.is_file()))


def tokenizer_of(folder: Path, rows: int) -> tuple[bytes, str]:
    """Returns the content of the tokenizer, opening texts as transformers does, and its file name. Writes nothing.

    Args:
        rows: rows of the embedding. Rows without a piece get special tokens, which no text becomes: with the names
            that transformers adds to a SentencePiece model, else <|unused_N|>.

    Raises:
        ArtefactError: there is no tokenizer, none is readable, its tokenizer_config.json or added_tokens.json is no
            JSON, or it has more pieces than the embedding has rows (one of ours: another number).
        UserError: the package `tokenizers` is needed and not installed.
    """
    paths = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not paths:
        raise ArtefactError(f"{folder}: no tokenizer: expected {' or '.join(TOKENIZERS)}")
    # transformers writes a tokenizer.json of a SentencePiece model, too, which is no byte-level BPE.
    for path in paths:
        try:
            content = path.read_bytes()
            vocabulary = read_vocabulary(content, str(path))
            break
        except ArtefactError:
            if path == paths[-1]:
                raise

    content = _with_first_token_of(durable.read_json(folder / TOKENIZER_CONFIG), content, vocabulary)
    pieces = vocabulary.vocab_size
    if pieces > rows or (vocabulary.is_trained and pieces < rows):
        raise ArtefactError(f"{path} has {pieces} pieces, the embedding has {rows} rows: not its tokenizer")

    # Embeddings are often larger than their tokenizer, and every id that a model can draw must have a name.
    unused = {token_id: f"<|unused_{token_id}|>" for token_id in range(pieces, rows)}
    if unused and isinstance(vocabulary, byte_level.ByteLevelModel):
        content = byte_level.with_marks(content, [*unused.values()], pieces)
    elif unused:
        names = {piece.piece for piece in sentencepiece_proto(content).pieces}
        for token_id, name in _added_tokens(folder).items():
            if token_id in unused and name not in names:
                unused[token_id] = name
                names.add(name)
        content = sentencepiece_with_marks(content, [*unused.values()])
    return content, vocabulary.file_name


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


def _added_tokens(folder: Path) -> dict[int, str]:
    """Returns the tokens that transformers adds to the file of a tokenizer, by id; empty without such files.

    Raises:
        ArtefactError: added_tokens.json or tokenizer_config.json is no JSON.
    """
    names = {token_id: name for name, token_id in durable.read_json(folder / ADDED_TOKENS).items()}
    for token_id, token in durable.read_json(folder / TOKENIZER_CONFIG).get("added_tokens_decoder", {}).items():
        names[int(token_id)] = token["content"]
    return {token_id: name for token_id, name in names.items() if name}


@lru_cache(maxsize=4)
def _tokenizer(folder: Path, rows: int, _changed_ns: tuple[int, ...]) -> tuple[bytes, str]:
    """Caches `tokenizer_of`: a command composes several configurations, and a large vocabulary takes a second."""
    return tokenizer_of(folder, rows)


def chat_template_of(folder: Path) -> str:
    """Returns the chat template, from its own file or from tokenizer_config.json; empty without one.

    Of several templates with names it is the one called default.

    Raises:
        ArtefactError: tokenizer_config.json is no JSON, or the file of the template is not UTF-8.
    """
    template_path = folder / TEMPLATE
    if template_path.is_file():
        try:
            return template_path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ArtefactError(f"{template_path}: byte {error.start} is not UTF-8: convert the file") from error

    template = durable.read_json(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):  # several templates with names
        template = next((named.get("template") for named in template if named.get("name") == "default"), None)
    if isinstance(template, str):
        return template
    return ""


def special_tokens_of(folder: Path) -> dict[str, str]:
    """Returns the texts of special tokens that chat templates may use: bos_token, eos_token and others, by name.

    tokenizer_config.json comes before special_tokens_map.json; without both files the result is empty.

    Raises:
        ArtefactError: one of the files is no JSON.
    """
    special_tokens = {}
    settings = durable.read_json(folder / SPECIAL_TOKENS) | durable.read_json(folder / TOKENIZER_CONFIG)
    for name, text in settings.items():
        if isinstance(text, dict):  # older files have objects
            text = text.get("content")
        if name.endswith("_token") and isinstance(text, str):
            special_tokens[name] = text
    return special_tokens


def snapshot_record(source: str, folder: Path) -> dict[str, Any]:
    """Returns what an import records of its snapshot: the commit of a model of the hub, or the files of a folder."""
    if Path(source).expanduser().is_file():
        return {}
    if not _is_folder(source):
        return {"revision": folder.name}  # huggingface_hub calls the folder of a snapshot by its commit
    return {"files": {name: _stamp(path) | {"sha256": durable.sha256_of(path)} for name, path in _files(folder)}}


def change_of(source: str, record: dict[str, Any]) -> str:
    """Returns what differs between the snapshot that `source` names and the recorded one; empty if nothing does.

    It is the name of the first file that differs, or `commit SHA` for a model of the hub, whose small files are
    fetched.

    Args:
        record: what `snapshot_record` returned at the import.

    Raises:
        ArtefactError, UserError: as `folder_of`.
        OSError: a file cannot be read.
    """
    folder = folder_of(source, weights=False)
    if not _is_folder(source):
        if record.get("revision") == folder.name:
            return ""
        return f"commit {folder.name}"

    paths = dict(_files(folder))
    recorded = record.get("files") or {}
    for name in sorted(paths.keys() | recorded.keys()):
        if name not in paths or name not in recorded:
            return name

        # Only a file with another size or time is hashed: weights take minutes.
        stamp = {key: recorded[name][key] for key in ("size", "mtime_ns")}
        if _stamp(paths[name]) != stamp and durable.sha256_of(paths[name]) != recorded[name]["sha256"]:
            return name
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of the snapshot; an empty one if it holds another JSON value.

    Raises:
        ArtefactError: the file is missing, or no JSON.
    """
    if not path.is_file():
        raise ArtefactError(f"{path} is missing: expected a folder of a model as transformers saves it")
    return durable.read_json(path)


def _is_folder(source: str) -> bool:
    return Path(source.removeprefix(HF)).expanduser().is_dir()


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Returns (name, path) of the files that an import reads, sorted."""
    return sorted((path.name, path) for pattern in (*SMALL, WEIGHTS) for path in folder.glob(pattern))


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
