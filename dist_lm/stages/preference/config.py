"""The keys of stage `preference`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from dist_lm.config.preference import PreferenceConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import TrainerGroup
from dist_lm.stages.corpus_forms import CorpusFormsConfig


@dataclass
class PreferenceStageConfig(TrainerGroup):
    """The `stage` group of stage preference."""

    preference: PreferenceConfig = field(default_factory=PreferenceConfig)


@dataclass
class PreferenceRunConfig(CorpusFormsConfig):
    """The configuration of stage preference."""

    corpus_forms = ("ranking",)

    stage: PreferenceStageConfig = MISSING


def settings_of(config: Config) -> PreferenceConfig:
    """Returns the group `stage.preference`."""
    assert isinstance(config, PreferenceRunConfig)
    return config.stage.preference
