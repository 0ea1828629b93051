"""The keys of stage `rankings`."""

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from dist_lm.errors import require
from dist_lm.stages.shards.identity import SAMPLED
from dist_lm.stages.shards.stage import CorporaConfig, CorporaStageConfig


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

    corpus: str = ""  # the model answers its prompts, where rules rank samples
    init_from: str = "auto"  # the model that answers: auto (the run of stage tools) | a run directory, a checkpoint
    samples: RankingSamplesConfig = field(default_factory=RankingSamplesConfig)

    def sampled_by(self) -> dict[str, Any]:
        return {"samples": asdict(self.samples), "prompts": self.corpus}

    @property
    def corpus_names(self) -> tuple[str, ...]:
        """The name of the corpus whose prompts are answered, if there is one."""
        return (self.corpus,) if self.corpus else ()


@dataclass
class RankingsConfig(CorporaConfig):
    """The configuration of stage rankings."""

    stage: RankingsStageConfig = MISSING

    @property
    def samples_a_model(self) -> bool:
        """Whether a source of rankings needs a model's answers to prompts."""
        return any(source.reader == SAMPLED for sources in self.corpus.corpora.values() for source in sources)

    @property
    def corpus_names(self) -> tuple[str, ...]:
        """The name of the corpus whose prompts are answered; none if it is not configured, because nothing needs it."""
        return tuple(name for name in super().corpus_names if name in self.corpus.corpora)

    def check_stage(self) -> None:
        super().check_stage()
        # The key has a default, which a corpus file of ready rankings need not have.
        if not self.samples_a_model:
            return
        accepted = f"one of the corpora of corpus={self.corpus.name}: {', '.join(self.corpus.corpora) or 'none'}"
        require(self.stage.corpus in ("", *self.corpus.corpora), "stage.corpus", self.stage.corpus, accepted)
