"""Reads the tokenizers that `tokenizer=PATH`, `tokenizer=hf:SOURCE` and `tokenizer=keep` name."""

from functools import lru_cache
from pathlib import Path

from dist_lm.config.corpus import HF, KEEP, TRAIN, TokenizerConfig
from dist_lm.errors import ConfigError
from dist_lm.interop.foreign_files import pieces_in
from dist_lm.interop.snapshot import named_tokenizer
from dist_lm.interop.snapshot_files import parsed
from dist_lm.storage.run_directory import WorkDirectory, tokenizer_in
from dist_lm.tokenizer.tokenizer import read_vocabulary, with_marks


def named_tokenizer_file(config: TokenizerConfig) -> bytes:
    """Returns the content of the tokenizer file that `config.source` names: a path, or `hf:SOURCE`, which may download
    it.

    With `config.add_marks`, the marks that the tokenizer lacks are appended. The content of a file at a path is checked
    only then. A path may be a folder with a `tokenizer.json` or `tokenizer.model`.

    Raises:
        ConfigError: there is no such file.
        ArtefactError: the file is no tokenizer, or there is no model `hf:SOURCE`.
        UserError: a package that is needed is not installed.
    """
    if config.source.startswith(HF):
        name = config.source
        content, _ = named_tokenizer(config.source)
    else:
        path = _path_of(config)
        name, content = str(path), path.read_bytes()

    if config.add_marks:
        return parsed(name, with_marks, content, name)
    return content


def existing_vocab_size(config: TokenizerConfig, work_dir: str) -> int | None:
    """Returns the number of pieces of the tokenizer that a configuration names, with the marks that it will get.

    None: the tokenizer will be trained, or is to be kept but is missing. A tokenizer of the hub is downloaded. The
    result is cached until the file changes.

    Args:
        work_dir: where `tokenizer=keep` looks.

    Raises:
        ConfigError: there is no such file.
        ArtefactError: the file is no tokenizer, or there is no model `hf:SOURCE`.
        UserError: a package that is needed is not installed.
    """
    if config.source == TRAIN:
        return None
    if config.source.startswith(HF):
        return _vocab_size_of(named_tokenizer_file(config), config.source)

    # A tokenizer to keep may be missing: then the stage that needs it says so. The work directory holds none that the
    # process with limits has not read.
    if config.source == KEEP:
        path = WorkDirectory(Path(work_dir)).tokenizer_model
        if not path.is_file():
            return None
        return _kept_vocab_size(path, config.add_marks, path.stat().st_mtime_ns)

    path = _path_of(config)
    return _vocab_size_at(path, config.add_marks, path.stat().st_mtime_ns)


def _path_of(config: TokenizerConfig) -> Path:
    """Returns the file that `config.source` names, itself or by its folder.

    Raises:
        ConfigError: there is no such file, or the folder has no tokenizer.
    """
    path = Path(config.source).expanduser()
    problem = f"no file {path}"
    if path.is_dir():
        path = tokenizer_in(path)
        problem = "the folder has no tokenizer.json or tokenizer.model"
    if path.is_file():
        return path

    raise ConfigError(
        f"tokenizer={config.source}: {problem}: expected train, keep, or the path of a tokenizer.model or "
        "tokenizer.json"
    )


# The results are cached: a command composes several configurations, and a large vocabulary takes a second to read.


@lru_cache(maxsize=8)
def _kept_vocab_size(path: Path, add_marks: bool, _changed_ns: int) -> int:
    content = path.read_bytes()
    if add_marks:
        content = with_marks(content, str(path))
    return read_vocabulary(content, str(path)).vocab_size


@lru_cache(maxsize=8)
def _vocab_size_at(path: Path, add_marks: bool, _changed_ns: int) -> int:
    content = path.read_bytes()
    if add_marks:
        content = parsed(str(path), with_marks, content, str(path))
    return parsed(str(path), pieces_in, content, str(path))


@lru_cache(maxsize=2)
def _vocab_size_of(content: bytes, name: str) -> int:
    return parsed(name, pieces_in, content, name)
