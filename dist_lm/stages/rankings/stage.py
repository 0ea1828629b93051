"""Stage `rankings`: builds corpora of rankings, work/corpora/NAME, from files, a hub, or samples of a model.

It runs after stage tools, because it may rank samples of that model (reader=synthetic_rankings). The launcher's process
generates these samples, so the model must fit one device.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from dist_lm.chat.documents import encode_ranking
from dist_lm.config.root import Config
from dist_lm.data.ingest import Texts
from dist_lm.data.sources.reader import corpus_sources
from dist_lm.errors import require
from dist_lm.stages.continuing import with_start
from dist_lm.stages.shards import (
    SAMPLED,
    CorporaConfig,
    CorporaStageConfig,
    build_corpus,
    correct_corpora,
    inspect_corpora,
    missing_corpora,
    own,
    wanted_corpora,
)
from dist_lm.stages.stage import Artefact, ArtefactStage, Look
from dist_lm.storage.run_directory import WorkDirectory

if TYPE_CHECKING:
    from dist_lm.tracking.console import Console


@dataclass
class RankingSamplesConfig:
    """Samples of a model that rules rank (reader=synthetic_rankings)."""

    fewest: int = 4  # samples per prompt, uniform from fewest to most
    most: int = 8
    max_new_tokens: int = 48
    temperature: float = 0.9

    def __post_init__(self) -> None:
        accepted = "from 2 to stage.samples.most, which is at most 16"
        require(2 <= self.fewest <= self.most <= 16, "stage.samples.fewest", self.fewest, accepted)
        key = "stage.samples.max_new_tokens"
        require(self.max_new_tokens > 0, key, self.max_new_tokens, "a positive integer")
        require(self.temperature > 0, "stage.samples.temperature", self.temperature, "a number above 0")


@dataclass
class RankingsStageConfig(CorporaStageConfig):
    """The `stage` group of stage rankings."""

    corpus: str = ""  # whose prompts the model answers, where rules rank its samples
    init_from: str = "auto"  # the model that answers: auto (the run of stage tools) | a run directory, a checkpoint
    samples: RankingSamplesConfig = field(default_factory=RankingSamplesConfig)

    def sampled_by(self) -> dict[str, Any]:
        return {"samples": asdict(self.samples), "prompts": self.corpus}

    @property
    def streams(self) -> tuple[str, ...]:
        """The corpus whose prompts are answered."""
        return (self.corpus,) if self.corpus else ()


@dataclass
class RankingsConfig(CorporaConfig):
    """The configuration of stage rankings."""

    stage: RankingsStageConfig = MISSING

    def check_stage(self) -> None:
        super().check_stage()
        accepted = f"one of the corpora of corpus={self.corpus.name}: {', '.join(self.corpus.corpora) or 'none'}"
        require(self.stage.corpus in ("", *self.corpus.corpora), "stage.corpus", self.stage.corpus, accepted)


class Rankings(ArtefactStage):
    name = "rankings"
    schema = RankingsConfig
    needs = ("shards",)
    starts_from = "tools"

    def for_readers(self, config: Config, readers: Sequence[Config]) -> Config:
        """Build only the corpora that later stages read, with samples of the model that they start from."""
        corpora = sorted({reader.stage.corpus for reader in readers if reader.stage.corpus})
        return replace(config, stage=replace(own(config), corpora=corpora, init_from=readers[0].stage.init_from))

    def look(self, config: Config, *, is_target: bool, rebuilt: Collection[str]) -> Look:
        return super().look(with_start(self, config), is_target=is_target, rebuilt=rebuilt)

    def inspect(self, config: Config) -> Artefact:
        names = wanted_corpora(config, rankings=True)
        return inspect_corpora(config, names, lambda counts: f"{counts.documents:,} rankings to train on")

    def build(self, config: Config, console: "Console") -> None:
        """Build every missing or damaged corpus."""
        assert isinstance(config, RankingsConfig)
        names = wanted_corpora(config, rankings=True)
        missing = missing_corpora(config, names)
        correct_corpora(config, [name for name in names if name not in missing])

        for name in missing:
            samples = {}
            for source in corpus_sources(config.corpus, name):
                if source.reader == SAMPLED:
                    from dist_lm.stages.rankings.samples import ranked_samples  # imports torch

                    samples[repr(source)] = list(ranked_samples(source, config, console))
            build_corpus(config, name, Texts(config.corpus, config.seed, samples), console, encode_ranking)

    def output(self, config: Config) -> Path:
        return WorkDirectory(Path(config.work_dir)).corpus("rankings")


STAGE = Rankings()
