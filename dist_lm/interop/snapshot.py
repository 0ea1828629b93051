"""Reads a model of transformers before it is imported: a folder that transformers saved, or a model of the hub.

`hf:FOLDER`, `hf:ORGANISATION/NAME` and `hf:ORGANISATION/NAME@REVISION` name one on the command line. A folder of
adapters names its base, whose shape and tokenizer it has. Nothing here reads weights.
"""

import re
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

from dist_lm.config.corpus import HF
from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, UserError, one_line, shown_value
from dist_lm.interop import adapter_folder, foreign_files
from dist_lm.interop.architectures import Architecture
from dist_lm.interop.snapshot_files import content_in, file_in, parsed
from dist_lm.storage import durable

CONFIG, INDEX, WHOLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
SMALL = ("*.json", "*.model", "*.jinja")  # the other files of a hub repository
WEIGHTS = "*.safetensors"
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")  # with the revision


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
    model of the hub the result is the folder of its commit; where the hub does not answer, that of the commit in the
    cache.

    Args:
        source: with or without `hf:`.
        weights: whether to fetch the weights too.

    Raises:
        ArtefactError: there is no such folder, and neither the hub nor the cache gives a model; the message says
            whether the hub was not reached, knows no such model or revision, or wants a login.
        UserError: huggingface_hub is not installed.
    """
    source = source.removeprefix(HF)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder

    hub_id = HUB_ID.fullmatch(source)
    if not hub_id:
        raise ArtefactError(f"{source}: no such folder, and no id of the hub, such as HuggingFaceTB/SmolLM2-135M")
    try:
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise UserError(f"{source}: the hub needs huggingface_hub: pip install huggingface_hub") from error
    # A repository may hold the weights in several formats; only safetensors are fetched.
    patterns = [*SMALL, WEIGHTS] if weights else [*SMALL, adapter_folder.WEIGHTS]
    try:
        return _fetched(hub_id[1], hub_id[2], patterns)
    except errors.GatedRepoError as error:
        raise ArtefactError(
            f"{source}: the model is gated: accept its terms on its page of the hub, then log in by `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ArtefactError(
            f"{source}: no such folder, and the hub shows no model of that id; a private one needs `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ArtefactError(f"{source}: the hub has the model, but no revision {hub_id[2]}") from error
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__ or error.__context__ or error
        raise ArtefactError(
            f"{source}: no such folder; the hub does not answer ({one_line(str(cause))}), and the cache "
            f"{constants.HF_HUB_CACHE} does not hold all of the model: fetch it where there is a network, by "
            f"`hf download {hub_id[1]}`, and copy that folder"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ArtefactError(f"{source}: no such folder, and the hub gave no model ({one_line(str(error))})") from error


def _fetched(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Returns the folder of a snapshot, fetched or in the cache; raises the errors of huggingface_hub."""
    from huggingface_hub import errors, snapshot_download

    fetch = partial(snapshot_download, hub_id, revision=revision, allow_patterns=patterns)
    # The HTTP client, and with it the class of its errors, depends on the version of huggingface_hub.
    client_error = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])
    try:
        return Path(fetch())
    except client_error as error:
        # After most failures of the network it has looked into the cache, but not after that of a proxy.
        if isinstance(error, OSError):
            raise
        return Path(fetch(local_files_only=True))


def named_base(folder: Path) -> str:
    """Returns the base that adapters name: a folder of this machine, or an id of the hub.

    Whoever wrote the adapters chose it. A folder that was downloaded comes from somebody else, who may not choose what
    is read on this machine: then only an id of the hub is followed.

    Raises:
        ArtefactError: an option is one that our adapters lack; or they name no base, or were downloaded and name a path
            of this machine. The message names the way out.
        UserError: no process can be started for reading the file.
    """
    base = adapter_folder.adapters_in(folder).base
    where = f"{folder / adapter_folder.CONFIG}: base_model_name_or_path"
    if not base:
        raise ArtefactError(f"{where} is missing: name the base by --base")
    is_path = Path(base).expanduser().exists() or not HUB_ID.fullmatch(base)
    if is_path and is_downloaded(folder):
        raise ArtefactError(
            f"{where}={shown_value(base)}: these adapters were downloaded, and name a path of this machine, which is "
            "not followed: if it is the base that you want, give it, as dist-lm import ADAPTERS NAME --base BASE, and "
            "start from that run"
        )
    return base


def is_downloaded(folder: Path) -> bool:
    """Tells whether a folder shows that it came from the hub or is a clone of git: by huggingface_hub's cache, or what
    it and git leave in a folder."""
    folder = folder.resolve()
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return in_cache or (folder / ".cache" / "huggingface").exists() or (folder / ".git").exists()


def base_of(folder: Path) -> Path | None:
    """Returns the folder of the base of adapters, without weights if it is of the hub; None: the folder holds a model.

    Raises:
        ArtefactError: the adapters have an option that ours lack, or their base is no model of transformers; or as
            `named_base`.
        UserError: as `folder_of`.
    """
    if not adapter_folder.holds_adapters(folder):
        return None
    base = named_base(folder)
    where = f"{folder / adapter_folder.CONFIG}: base_model_name_or_path={shown_value(base)}"
    try:
        base_folder = folder_of(base, weights=False)
    except ArtefactError as error:
        raise ArtefactError(f"{where}: {error}: name the base by dist-lm import ADAPTERS NAME --base BASE") from error
    if not (base_folder / CONFIG).exists():
        raise ArtefactError(
            f"{where}: no folder that transformers saved: name the base, or a run of ours, by dist-lm import ADAPTERS "
            "NAME --base BASE, and start from that run"
        )
    return base_folder


def tokenizer_folder_of(folder: Path) -> Path:
    """Returns the folder with tokenizer and chat template: `folder`, or for adapters without a tokenizer their base.

    Raises:
        ArtefactError, UserError: as `base_of`.
    """
    if holds_tokenizer(folder):
        return folder
    return base_of(folder) or folder


def holds_tokenizer(folder: Path) -> bool:
    """Returns whether a folder has a file of a tokenizer."""
    return any((folder / name).exists() for name in TOKENIZERS)


def model_in(folder: Path, name: str) -> tuple[ModelConfig, Architecture]:
    """Returns the model that the config.json of a folder describes, called `name`, and its architecture.

    Of a folder of adapters it is the model of their base, with the rows of an embedding and the head that they hold.

    Raises:
        ArtefactError: the file is missing or no JSON, or names an option that our model lacks; or as `base_of`.
        UserError: as `base_of`.
    """
    if base := base_of(folder):
        model, architecture = model_in(base, name)
        return adapter_folder.with_whole_weights(model, adapter_folder.adapters_in(folder)), architecture

    where = str(folder / CONFIG)
    content = content_in(folder, CONFIG)
    if content is None:
        raise ArtefactError(f"{where} is missing: expected a folder of a model as transformers saves it")
    options, architecture = parsed(where, foreign_files.described_model, content, name, where)
    return ModelConfig(**options), Architecture(**architecture)


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
    folder = tokenizer_folder_of(folder)
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
    contents = {name: content for name in TOKENIZERS if (content := content_in(folder, name)) is not None}
    if not contents:
        raise ArtefactError(f"{folder}: no tokenizer: expected {' or '.join(TOKENIZERS)}")
    content, file_name = parsed(
        str(folder / next(iter(contents))),
        foreign_files.fitted_tokenizer,
        str(folder),
        rows,
        [*contents],
        content_in(folder, TOKENIZER_CONFIG),
        content_in(folder, ADDED_TOKENS),
        *contents.values(),
    )
    return content, file_name


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
    contents = content_in(folder, TEMPLATE), content_in(folder, TOKENIZER_CONFIG)
    return parsed(str(folder / TEMPLATE), foreign_files.template_in, *contents, str(folder))


def special_tokens_of(folder: Path) -> dict[str, str]:
    """Returns the texts of special tokens that chat templates may use: bos_token, eos_token and others, by name.

    tokenizer_config.json comes before special_tokens_map.json; without both files the result is empty.

    Raises:
        ArtefactError: one of the files is no JSON.
    """
    contents = content_in(folder, TOKENIZER_CONFIG), content_in(folder, SPECIAL_TOKENS)
    return parsed(str(folder / TOKENIZER_CONFIG), foreign_files.special_tokens_in, *contents, str(folder))


def snapshot_record(source: str, folder: Path) -> dict[str, Any]:
    """Returns what an import records of its snapshot: id and commit of a model of the hub, or hash and status of the
    files of a folder; nothing of a single file.

    Raises:
        ArtefactError: a file is a link that leaves the folder, or no regular file.
        OSError: a file cannot be read.
    """
    if Path(source).expanduser().is_file():
        return {}
    if not _is_folder(source):
        hub_id, _ = _hub_id_of(source)
        return {"id": hub_id, "revision": folder.name}  # huggingface_hub calls the folder of a snapshot by its commit
    return {"files": {name: _stamp(path) | {"sha256": durable.sha256_of(path)} for name, path in _files(folder)}}


def change_of(source: str, record: dict[str, Any]) -> str:
    """Returns what differs between the snapshot that `source` names and the recorded one; empty if nothing does.

    It is the name of the first file that differs, or `commit SHA` for a model of the hub, whose small files are
    fetched. A model of the hub without a revision is the recorded commit, although its branch may have moved since.

    Args:
        record: what `snapshot_record` returned at the import.

    Raises:
        ArtefactError, UserError: as `folder_of`; or a file is a link that leaves the folder.
        OSError: a file cannot be read.
    """
    if not _is_folder(source):
        hub_id, revision = _hub_id_of(source)
        if record.get("id") == hub_id and revision in ("", record.get("revision")):
            return ""
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


def _hub_id_of(source: str) -> tuple[str, str]:
    """Returns (id, revision) of a model of the hub; the revision is empty if `source` names none."""
    hub_id, _, revision = source.removeprefix(HF).partition("@")
    return hub_id, revision


def _is_folder(source: str) -> bool:
    return Path(source.removeprefix(HF)).expanduser().is_dir()


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Returns (name, path) of the files that an import reads, sorted by name.

    Raises:
        ArtefactError: one is a link that leaves the folder, or no regular file.
    """
    names = sorted({path.name for pattern in (*SMALL, WEIGHTS) for path in folder.glob(pattern)})
    paths = ((name, file_in(folder, name)) for name in names)
    return [(name, path) for name, path in paths if path]


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
