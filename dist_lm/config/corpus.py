"""The conf groups `corpus` and `tokenizer`: which documents are read, and how the tokenizer is trained on them."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf

from dist_lm.errors import require

SPLITS = ("train", "val")


@dataclass
class SourceConfig:
    """One source of a corpus: the reader, and the settings that the reader takes.

    `data/sources/reader.py` says what a reader is; a reader of your own may use any of these settings.
    """

    # hub | hub_tools | hub_rankings | rankings (files of your own) | tools (generated) | synthetic_rankings (samples of
    # the model, ranked by rules) | the import path of a function: my_package.my_module:read_notes
    reader: str = MISSING
    language: str = MISSING  # the name that metrics have; english, python, bash and sql have rules of their own
    licence: str = ""
    limit: int = 0  # documents; 0: all
    dataset: str = (
        ""  # hub...: id of the data set, or a local folder or file with the same columns; rankings: file or glob
    )
    revision: str = "main"  # hub
    subset: str | None = None  # hub: configuration name of the data set
    data_dir: str | None = None  # hub: folder inside the data set
    split: str = "train"  # hub: split of the data set (train/val is ours, by document hash)
    column: str = "text"  # hub: the column that holds the document
    licence_column: str = ""  # hub: the column that holds the licence of each row; none: `licence` for all
    rows: str = ""  # hub_rankings: oasst1 | hh-rlhf | helpsteer3 | ultrafeedback; none: by the name of the data set
    only: list[str] = field(default_factory=list)  # hub_rankings of oasst1: languages that are kept (en); none: all

    def __post_init__(self) -> None:
        require(
            "@" not in self.dataset.partition("://")[2].partition("/")[0],
            f"corpus source {self.reader}: dataset",
            "(an address with a password)",
            "an address without one (give a token in HF_TOKEN); the configuration is written to disk",
        )
        require(
            self.limit >= 0,
            f"corpus source {self.reader}: limit",
            self.limit,
            "0 (all) or a positive integer",
        )


def _source(item: Any) -> SourceConfig:
    typed = item if isinstance(item, SourceConfig) else OmegaConf.merge(OmegaConf.structured(SourceConfig), item)
    source = OmegaConf.to_object(OmegaConf.structured(typed))
    assert isinstance(source, SourceConfig)
    return source


@dataclass
class CorpusConfig:
    """The sources of every corpus, by corpus name."""

    name: str = MISSING  # local | hub
    corpora: dict[str, list[SourceConfig]] = field(default_factory=dict)
    val_fraction: float = 0.02  # share of documents kept out of training, chosen by hash
    max_document_bytes: int = 1_000_000  # longer documents are dropped and counted
    documents_per_member: int = 256  # documents grouped in one member of a tar
    shard_tokens: int = 64_000_000  # tokens a tar

    def __post_init__(self) -> None:
        # OmegaConf checks the types of dataclasses inside a list, but not of those in a list inside a mapping
        self.corpora = {name: [_source(item) for item in sources] for name, sources in self.corpora.items()}
        require(0 < self.val_fraction < 1, "corpus.val_fraction", self.val_fraction, "in (0, 1)")
        require(self.documents_per_member > 0, "corpus.documents_per_member", self.documents_per_member, ">= 1")
        require(self.shard_tokens > 0, "corpus.shard_tokens", self.shard_tokens, ">= 1")


@dataclass
class TokenizerConfig:
    """How the SentencePiece BPE is trained."""

    vocab_size: int = MISSING  # pieces, special ones included
    train_bytes: int = 200_000_000  # text sampled for training; the same share of every language
    workers: int = 0  # processes that encode; 0: all cores

    def __post_init__(self) -> None:
        require(
            512 <= self.vocab_size <= 65536,
            "tokenizer.vocab_size",
            self.vocab_size,
            "512 to 65536 (256 byte pieces, special tokens, and tokens that fit uint16)",
        )
        require(self.train_bytes > 0, "tokenizer.train_bytes", self.train_bytes, "a positive number of bytes")
        require(self.workers >= 0, "tokenizer.workers", self.workers, "0 (all cores) or a positive integer")
