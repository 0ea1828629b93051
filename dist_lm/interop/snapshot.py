"""A model of transformers before it is imported: a folder that transformers saved, or a model of the Hugging Face hub.

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
    sentencepiece_without_opening,
)

CONFIG, INDEX, WHOLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
SMALL = ("*.json", "*.model", "*.jinja")  # files of a hub repository beside its weights
WEIGHTS = "*.safetensors"


def name_of(source: str) -> str:
    """The name of the run that an import on the way writes: that of the folder, or of the model on the hub."""
    text = source.removeprefix(HF)
    folder = Path(text).expanduser()
    last = folder.resolve().name if folder.is_dir() else text.partition("@")[0].rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_.-]", "-", last).lstrip("._-") or "model"


def folder_of(source: str, weights: bool = True) -> Path:
    """The folder that `source` names; a model of the hub is fetched into huggingface_hub's cache.

    Args:
        weights: fetch the weights too.

    Raises:
        ArtefactError: there is no such folder, and the hub gives no model.
        UserError: huggingface_hub is not installed.
    """
    source = source.removeprefix(HF)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    named = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", source)
    if not named:
        raise ArtefactError(f"{source}: no such folder, and no id of the hub, such as HuggingFaceTB/SmolLM2-135M")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(f"{source}: the hub needs huggingface_hub: pip install huggingface_hub") from error
    wanted = [*SMALL, WEIGHTS] if weights else [*SMALL]
    try:
        return Path(snapshot_download(named[1], revision=named[2], allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{source}: no such folder, and the hub gave no model ({reason})") from error


def model_in(folder: Path, name: str) -> tuple[ModelConfig, Architecture]:
    """The model that the config.json of a folder describes, called `name`.

    Raises:
        ArtefactError: the file is missing, or names an option that our model lacks.
    """
    return model_of(read_json(folder / CONFIG), name, str(folder / CONFIG))


def named_model(source: str) -> ModelConfig:
    """The model that `source` names, without its head: stages choose that themselves."""
    model, _ = model_in(folder_of(source, weights=False), name_of(source))
    return replace(model, head="tokens")


def named_tokenizer(source: str) -> tuple[bytes, str]:
    """The content of the tokenizer of the model that `source` names, as an import writes it, and its file name."""
    folder = folder_of(source, weights=False)
    rows = model_in(folder, name_of(source))[0].vocab_size
    files = [folder / name for name in TOKENIZERS]
    return _tokenizer(folder, rows, tuple(file.stat().st_mtime_ns for file in files if file.is_file()))


def tokenizer_of(folder: Path, rows: int) -> tuple[bytes, str]:
    """The content of the tokenizer and its file name.

    Args:
        rows: of the embedding. Rows without a piece get special tokens, which no text becomes: with the names that
            transformers adds to a SentencePiece model, else <|unused_N|>.

    Raises:
        ArtefactError: there is none, or it has more pieces than the embedding has rows.
    """
    given = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not given:
        raise ArtefactError(f"{folder}: no tokenizer: expected {' or '.join(TOKENIZERS)}")
    for path in given:
        try:
            content = path.read_bytes()
            vocabulary = read_vocabulary(content, str(path))
            break
        except ArtefactError:
            if path == given[-1]:
                raise
    content = _opened(content, vocabulary, durable.read_json(folder / TOKENIZER_CONFIG))
    pieces = vocabulary.vocab_size
    if pieces > rows or (vocabulary.is_trained and pieces < rows):
        raise ArtefactError(f"{path} has {pieces} pieces, the embedding has {rows} rows: not its tokenizer")
    unused = {number: f"<|unused_{number}|>" for number in range(pieces, rows)}
    if unused and isinstance(vocabulary, byte_level.ByteLevelModel):
        content = byte_level.with_marks(content, [*unused.values()], pieces)
    elif unused:
        there = {piece.piece for piece in sentencepiece_proto(content).pieces}
        for number, name in _added_tokens(folder).items():
            if number in unused and name not in there:
                unused[number] = name
                there.add(name)
        content = sentencepiece_with_marks(content, [*unused.values()])
    return content, vocabulary.file_name


def _opened(content: bytes, vocabulary: Vocabulary, settings: Mapping[str, Any]) -> bytes:
    """The tokenizer, opening texts as transformers does: `add_bos_token` of tokenizer_config.json, else as the file."""
    wanted = settings.get("add_bos_token")
    if isinstance(vocabulary, SentencePieceModel):
        leaves_out = wanted is False and vocabulary.opening is not None
        return sentencepiece_without_opening(content) if leaves_out else content
    mark = settings.get("bos_token")
    mark = mark.get("content") if isinstance(mark, dict) else mark
    if wanted is True and vocabulary.opening is None and isinstance(mark, str) and mark in vocabulary.special_ids:
        return byte_level.with_opening(content, mark)
    return content


def _added_tokens(folder: Path) -> dict[int, str]:
    """The tokens that transformers adds to the file of a tokenizer, by id."""
    found = {number: name for name, number in durable.read_json(folder / ADDED_TOKENS).items()}
    for number, token in durable.read_json(folder / TOKENIZER_CONFIG).get("added_tokens_decoder", {}).items():
        found[int(number)] = token["content"]
    return {number: name for number, name in found.items() if name}


@lru_cache(maxsize=4)
def _tokenizer(folder: Path, rows: int, _changed_ns: tuple[int, ...]) -> tuple[bytes, str]:
    """A command composes several configurations, and a large vocabulary takes a second to read."""
    return tokenizer_of(folder, rows)


def chat_template_of(folder: Path) -> str:
    """The chat template, from its own file or from tokenizer_config.json; empty without one."""
    own = folder / TEMPLATE
    if own.is_file():
        return own.read_text(encoding="utf-8")
    value = durable.read_json(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(value, list):  # several by name
        value = next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    return value if isinstance(value, str) else ""


def special_tokens_of(folder: Path) -> dict[str, str]:
    """The texts of special tokens that chat templates may use: bos_token, eos_token and others, by name."""
    found = {}
    given = durable.read_json(folder / SPECIAL_TOKENS) | durable.read_json(folder / TOKENIZER_CONFIG)
    for name, value in given.items():
        text = value.get("content") if isinstance(value, dict) else value  # older files have objects
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def snapshot_record(source: str, folder: Path) -> dict[str, Any]:
    """What an import records of its snapshot: the commit of a model of the hub, or the files of a folder."""
    if Path(source).expanduser().is_file():
        return {}
    if not _is_folder(source):
        return {"revision": folder.name}  # huggingface_hub calls the folder of a snapshot by its commit
    return {"files": {name: _stamp(path) | {"sha256": durable.sha256_of(path)} for name, path in _files(folder)}}


def change_of(source: str, record: dict[str, Any]) -> str:
    """What differs between the snapshot that `source` names and one that was recorded; empty if nothing does."""
    folder = folder_of(source, weights=False)
    if not _is_folder(source):
        return "" if record.get("revision") == folder.name else f"commit {folder.name}"
    paths, before = dict(_files(folder)), record.get("files") or {}
    for name in sorted(paths.keys() | before.keys()):
        if name not in paths or name not in before:
            return name
        known, path = before[name], paths[name]
        same = _stamp(path) == {key: known[key] for key in ("size", "mtime_ns")}
        if not same and durable.sha256_of(path) != known["sha256"]:
            return name
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file of the snapshot.

    Raises:
        ArtefactError: it is missing.
    """
    if not path.is_file():
        raise ArtefactError(f"{path} is missing: expected a folder of a model as transformers saves it")
    return durable.read_json(path)


def _is_folder(source: str) -> bool:
    return Path(source.removeprefix(HF)).expanduser().is_dir()


def _files(folder: Path) -> list[tuple[str, Path]]:
    """The files that an import reads, by name."""
    return sorted((path.name, path) for pattern in (*SMALL, WEIGHTS) for path in folder.glob(pattern))


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
