"""The conf group `stage` where it is `generate`: prompts in, samples out."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from dist_lm.config.rlhf_run import RlhfRunConfig
from dist_lm.config.root import Config
from dist_lm.errors import require

AUTO = "auto"


@dataclass
class GenerateConfig:
    """What is generated, from which checkpoint, and how large the engines are.

    Bounds of the sampling parameters and of the engine are those of `SamplingParams` and `EngineOptions`
    (`stages/generate.py` holds these values against them before anything starts).
    """

    name: str = MISSING
    prompts: str = ""  # file, glob or http(s) address: .jsonl with `prompt` and perhaps `id`, or .txt, a prompt a line
    checkpoint: str = AUTO  # run or checkpoint; auto: the newest of the code stage, else of the language stage
    n: int = 1  # answers a prompt
    prompts_per_shard: int = 1000  # that go to one file; what a kill leaves unfinished is done again by files
    truncate: str = "refuse"  # a prompt that leaves no room in the context: refuse | left (its beginning is cut off)
    actors: int = -1  # engines; -1: one for each parallel.tp GPUs of a node, or one a node without GPUs
    max_new_tokens: int = 128
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> added to its logit
    stop: list[str] = field(default_factory=list)  # texts that end an answer
    stop_tokens: list[int] = field(default_factory=list)  # beside end-of-text
    ignore_eot: bool = False  # end-of-text is a token like others
    cache_tokens: int = 16384  # of all sequences of an engine together
    page_tokens: int = 64
    max_sequences: int = 64  # that an engine runs at a time

    def __post_init__(self) -> None:
        for key in ("n", "prompts_per_shard"):
            require(getattr(self, key) > 0, f"stage.{key}", getattr(self, key), "a positive integer")
        require(self.actors == -1 or self.actors > 0, "stage.actors", self.actors, "a positive integer, or -1")
        require(self.truncate in ("refuse", "left"), "stage.truncate", self.truncate, "refuse or left")
        require(bool(self.checkpoint), "stage.checkpoint", self.checkpoint, "auto, or the path of a run or checkpoint")
        require(
            "@" not in self.prompts.partition("://")[2].partition("/")[0],
            "stage.prompts",
            "(an address with a password)",
            "an address without one; the configuration is written to disk",
        )


@dataclass
class GenerateRunConfig(Config):
    """The whole configuration where the stage is `generate`."""

    stage: GenerateConfig = MISSING

    def check_stage(self) -> None:
        """Nothing of it depends on other groups."""


def schema_of(stage: str) -> type[Config]:
    """The dataclass of a configuration, by the name of its stage."""
    return {"generate": GenerateRunConfig, "rlhf": RlhfRunConfig}.get(stage, Config)
