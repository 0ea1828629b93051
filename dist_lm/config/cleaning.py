"""The keys `corpus.cleaning`: what is dropped from the corpora of a configuration, and what is replaced."""

from dataclasses import dataclass, field

from dist_lm.errors import require


@dataclass
class CleaningConfig:
    """Each step is on or off. `data/cleaning.py` has the rules and their sources; docs/data.md says why which is on."""

    min_document_bytes: int = 0  # UTF-8; shorter documents are dropped (too_short)
    encoding: bool = True  # texts with many U+FFFD, the mark of bytes that were decoded wrongly (undecodable)
    across_corpora: bool = False  # a text that an earlier corpus of the configuration has (duplicate)
    licences: list[str] = field(default_factory=list)  # documents with any other licence, or none (licence); []: all
    generated: bool = False  # files that a program wrote (generated)
    minified: bool = False  # code without line ends (minified)
    vendored: bool = False  # copies of other people's files, by their folder (vendored)
    secrets: bool = True  # keys and tokens become <KEY>
    emails: bool = True  # addresses become <EMAIL>

    def __post_init__(self) -> None:
        require(
            self.min_document_bytes >= 0,
            "corpus.cleaning.min_document_bytes",
            self.min_document_bytes,
            "0 (all) or a positive number of bytes",
        )
        require(all(self.licences), "corpus.cleaning.licences", self.licences, "names such as [MIT, Apache-2.0]")
