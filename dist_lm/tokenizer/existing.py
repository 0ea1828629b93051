"""Existing tokenizers: those that `tokenizer=PATH`, `tokenizer=hf:SOURCE` or `tokenizer=keep` name."""

from functools import lru_cache
from pathlib import Path

from dist_lm.config.corpus import HF, KEEP, TRAIN, TokenizerConfig
from dist_lm.errors import ConfigError
from dist_lm.storage.run_directory import WorkDirectory, tokenizer_in
from dist_lm.tokenizer.tokenizer import read_vocabulary, with_marks


def given_tokenizer(config: TokenizerConfig) -> bytes:
    """The content of the tokenizer at `config.source`: as it is, or with the marks it lacks (`config.add_marks`).

    Raises:
        ConfigError: there is no such file.
        ArtefactError: it is no tokenizer.
    """
    if config.source.startswith(HF):
        content, _ = _named_tokenizer(config.source)
        return with_marks(content, config.source) if config.add_marks else content
    path = _given_path(config)
    content = path.read_bytes()
    return with_marks(content, str(path)) if config.add_marks else content


def existing_vocab_size(config: TokenizerConfig, work_dir: str) -> int | None:
    """Pieces of the tokenizer that a configuration names; None if it is to be trained, or kept but missing.

    Raises:
        ConfigError: there is no such file.
        ArtefactError: it is no tokenizer.
    """
    if config.source == TRAIN:
        return None
    if config.source.startswith(HF):
        return _vocab_size_of(given_tokenizer(config), config.source)
    if config.source == KEEP:
        path = WorkDirectory(Path(work_dir)).tokenizer_model
        if not path.is_file():
            return None
    else:
        path = _given_path(config)
    return _vocab_size(path, config.add_marks, path.stat().st_mtime_ns)


def _given_path(config: TokenizerConfig) -> Path:
    named = Path(config.source).expanduser()
    path = tokenizer_in(named) if named.is_dir() else named
    if not path.is_file():
        there = "the folder has no tokenizer.json or tokenizer.model" if named.is_dir() else f"no file {path}"
        raise ConfigError(
            f"tokenizer={config.source}: {there}: expected train, keep, or the path of a tokenizer.model or "
            "tokenizer.json"
        )
    return path


@lru_cache(maxsize=8)
def _vocab_size(path: Path, add_marks: bool, mtime_ns: int) -> int:
    """A command composes several configurations, and a large vocabulary takes a second to read."""
    content = path.read_bytes()
    content = with_marks(content, str(path)) if add_marks else content
    return read_vocabulary(content, str(path)).vocab_size


@lru_cache(maxsize=2)
def _vocab_size_of(content: bytes, name: str) -> int:
    return read_vocabulary(content, name).vocab_size


def _named_tokenizer(source: str) -> tuple[bytes, str]:
    from dist_lm.interop.snapshot import named_tokenizer  # only for models of transformers

    return named_tokenizer(source)
