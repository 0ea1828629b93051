"""The whole configuration where the stage is `rlhf`: iterations are its steps, prompts its corpus."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import MISSING

from dist_lm.config import Config
from dist_lm.errors import require
from dist_lm.pool_config import RolloutPoolConfig
from dist_lm.rlhf_config import RlhfConfig
from dist_lm.run_directory import WorkDirectory

AUTO = "auto"


@dataclass
class RlhfRunGroup(RlhfConfig):
    """An iteration (`RlhfConfig`), and what a run of them needs around it."""

    # file or glob of prompts (.jsonl or .txt, a request a line); none: the beginnings of stage.corpus' documents, up to
    # where the assistant's turn is
    prompts_from: str = ""
    held_out_from: str = ""  # the same for held-out prompts; none: those of prompts_from that a hash keeps out, or val
    reward_model: str = AUTO  # run of stage reward; auto: the one under the same run_id
    held_out_prompts: int = 64  # for the win rate before the first iteration and after the last; 0: it is not measured
    table_rollouts: int = 16  # that samples/step_N.jsonl shows, every stage.eval_every iterations
    pool: RolloutPoolConfig = field(default_factory=RolloutPoolConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        # a part of no weight is none: so a command can take away what a file of conf/ gives
        self.rewards = {name: part for name, part in self.rewards.items() if part.weight}
        for key in ("held_out_prompts", "table_rollouts"):
            require(getattr(self, key) >= 0, f"rlhf.{key}", getattr(self, key), "0 or a positive integer")
        require(bool(self.rewards), "rlhf.rewards", self.rewards, "at least one part")
        require(bool(self.reward_model), "rlhf.reward_model", self.reward_model, "auto, or the path of a run")
        self.check_unused()

    def check_unused(self) -> None:
        """Refuse what this stage cannot do, where saying nothing would mislead."""
        coefficient = self.pretrain_coefficient
        require(coefficient == 0, "rlhf.pretrain_coefficient", coefficient, "0: the stage has no pretraining stream")

    @property
    def asks_reward_model(self) -> bool:
        """Whether a part of the reward is the reward model's score."""
        return any(part.kind == "reward_model" for part in self.rewards.values())


@dataclass
class RlhfRunConfig(Config):
    """The whole configuration where the stage is `rlhf`."""

    rlhf: RlhfRunGroup = MISSING

    @property
    def pool(self) -> RolloutPoolConfig:
        return self.rlhf.pool

    @property
    def takes_sequences(self) -> bool:
        return False

    @property
    def trained_models(self) -> int:
        return 2

    @property
    def not_needed(self) -> tuple[str, ...]:
        asks = self.rlhf.asks_reward_model and self.rlhf.reward_model == AUTO
        sources = self.corpus.corpora.get(self.stage.corpus, [])
        reads = not self.rlhf.prompts_from and any(source.reader.endswith("rankings") for source in sources)
        return (*(() if asks else ("reward",)), *(() if reads else ("rankings",)))

    def check_stage(self) -> None:
        super().check_stage()
        longest, new = self.model.max_seq_len, self.rlhf.max_new_tokens
        require(new < longest, "rlhf.max_new_tokens", new, f"less than model.max_seq_len={longest}")
        require(
            self.rlhf.pool.cache_tokens >= longest,
            "rlhf.pool.cache_tokens",
            self.rlhf.pool.cache_tokens,
            f"at least model.max_seq_len={longest}",
        )


def with_reward_run(config: RlhfRunConfig) -> RlhfRunConfig:
    """`config` with rlhf.reward_model as an absolute path; empty where no part of the reward asks it."""
    found = config.rlhf.reward_model
    if not config.rlhf.asks_reward_model:
        found = "none"
    elif found == AUTO:
        found = str(WorkDirectory(Path(config.work_dir).resolve()).run("reward", config.run_id).path)
    else:
        found = str(Path(found).expanduser().resolve())
    return replace(config, rlhf=replace(config.rlhf, reward_model=found))
