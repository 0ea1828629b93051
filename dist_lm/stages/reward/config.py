"""The keys of stage `reward`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from dist_lm.config.stage import TrainerGroup
from dist_lm.errors import require
from dist_lm.stages.corpus_forms import CorpusFormsConfig


@dataclass
class RewardConfig:
    """The choices that stage reward learns from a ranking, and the samples whose scores it measures at the end."""

    # rankings: every one whole | pairs: of K completions K - 1 pairs, drawn once | one_pair: one of these
    learn_from: str = "rankings"
    label_noise: float = 0.0  # share of neighbouring ranks, and of judgements, that are swapped in train
    normaliser_prompts: int = 256  # prompts of val that the initial model answers; 0: score the completions of val
    normaliser_new_tokens: int = 128  # longest of these answers

    def __post_init__(self) -> None:
        lessons = ("rankings", "pairs", "one_pair")
        require(self.learn_from in lessons, "stage.reward.learn_from", self.learn_from, "rankings, pairs or one_pair")
        require(0 <= self.label_noise < 0.5, "stage.reward.label_noise", self.label_noise, "in [0, 0.5)")
        for key, lowest in (("normaliser_prompts", 0), ("normaliser_new_tokens", 1)):
            require(getattr(self, key) >= lowest, f"stage.reward.{key}", getattr(self, key), f"at least {lowest}")


@dataclass
class RewardStageConfig(TrainerGroup):
    """The `stage` group of stage reward."""

    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass
class RewardRunConfig(CorpusFormsConfig):
    """The configuration of stage reward."""

    corpus_forms = ("ranking",)

    stage: RewardStageConfig = MISSING
