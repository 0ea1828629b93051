"""The keys of stage `rlhf`: an iteration (`RlhfConfig`), the keys of a whole run, and their pool of engines."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import MISSING

from dist_lm.config.model import ModelConfig
from dist_lm.config.pool import (
    FEWEST_PAGE_TOKENS,
    MOST_PAGE_TOKENS,
    PUSH_AUTO,
    PUSH_DIRECT,
    PUSH_RAY,
    SHARED,
    RolloutPoolConfig,
)
from dist_lm.config.root import Config
from dist_lm.config.stage import TrainingGroup, check_shares
from dist_lm.data.journal import ROWS
from dist_lm.data.prompt_rows import find_rows
from dist_lm.data.sources.reader import corpora_of_form
from dist_lm.environments.program_command import PROGRAM, files_of
from dist_lm.environments.protocol import Limits
from dist_lm.errors import ArtefactError, require
from dist_lm.rlhf.algorithms.registry import ALGORITHMS
from dist_lm.rlhf.config import CALL_CONSTRAINTS, ENVIRONMENT, RewardPartConfig, RlhfConfig
from dist_lm.stages.corpus_forms import CorpusFormsConfig
from dist_lm.storage.run_directory import WorkDirectory

RANK, PROCESS = "rank", "process"  # values of rlhf.controller
AUTO, NO_MODEL = "auto", "none"  # values of rlhf.reward_model that name no run


@dataclass
class EnvironmentLimitsConfig:
    """The group `rlhf.environment_limits`: limits of one conversation (`environments.protocol.Limits`)."""

    turns: int = 16  # of the model; each has at most rlhf.max_new_tokens
    tokens: int = 4096  # that the model reads and draws in all; never more than model.max_seq_len
    seconds_a_step: float = 30.0  # of one answer of the environment
    seconds: float = 600.0  # of all its answers together
    observation_bytes: int = 65_536  # of one answer, as JSON
    memory_bytes: int = 2 << 30  # of a process with an environment of your own

    @property
    def limits(self) -> Limits:
        return Limits(**asdict(self))

    def check(self) -> None:
        """Refuses limits that are not positive.

        Raises:
            ConfigError: names the key.
        """
        for key, value in asdict(self).items():
            accepted = "a positive number" if isinstance(value, float) else "a positive integer"
            require(0 < value < math.inf, f"rlhf.environment_limits.{key}", value, accepted)


@dataclass
class RlhfRunGroup(RlhfConfig):
    """An iteration (`RlhfConfig`), and the keys of a whole run."""

    # file or glob of prompts (.txt: one request per line; .jsonl, .json, .parquet: rows, whose other columns the
    # functions of rlhf.rewards see); empty: the documents of stage.corpus up to the assistant's turn
    prompts_from: str = ""
    # what the model talks with for several turns, whose verdict is the reward: a name of the project's own, a class of
    # yours, FILE:CLASS or PACKAGE.MODULE:CLASS, or a program that speaks HTTP, program:COMMAND; its tasks are the rows
    # of prompts_from. Empty: one completion
    environment: str = ""
    environment_limits: EnvironmentLimitsConfig = field(default_factory=EnvironmentLimitsConfig)
    environments_at_once: int = 64  # most conversations at a time
    # where prompts, environments, rules and the order of drawing are: in the first rank, or in a process that it
    # starts, and starts again if that dies. process: with actors
    controller: str = RANK
    # false: each save removes the recorded conversations of iterations before the oldest kept checkpoint
    keep_conversations: bool = True
    held_out_from: str = ""  # file of held-out prompts; empty: one in 16 of prompts_from by hash, or the val split
    # run of stage reward; auto: the run with the same run_id; none: without the parts of kind reward_model
    reward_model: str = AUTO
    held_out_prompts: int = 64  # for the win rate before the first and after the last iteration; 0: not measured
    table_rollouts: int = 16  # rollouts in samples/step_N.jsonl, every stage.eval_every iterations
    # with rlhf.pretrain_coefficient above 0: text whose next-token loss is added to the policy loss of every update
    pretrain_corpus: str = "code"
    pretrain_mix: dict[str, float] = field(default_factory=dict)  # share of its sequences from other corpora, by name
    pretrain_sequences: int = 16  # per update over all ranks
    pretrain_seq_len: int = 256  # tokens
    pool: RolloutPoolConfig = field(default_factory=RolloutPoolConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Weight 0 removes a part, so that a command can remove parts of conf/.
        self.rewards = {
            name: part
            for name, part in self.rewards.items()
            if part.weight and (part.kind != "reward_model" or self.reward_model != NO_MODEL)
        }
        for key in ("held_out_prompts", "table_rollouts"):
            require(getattr(self, key) >= 0, f"rlhf.{key}", getattr(self, key), "0 or a positive integer")
        if self.environment and not self.rewards:
            self.rewards = {ENVIRONMENT: RewardPartConfig(kind=ENVIRONMENT)}
        require(bool(self.rewards), "rlhf.rewards", self.rewards, "at least one part")
        self._check_environment()
        self._check_controller()

        # Tests are columns of a file of prompts; documents of a corpus have none.
        tested = [name for name, part in self.rewards.items() if part.kind == "tests"]
        accepted = f"a file of prompts with tests, for rlhf.rewards.{'.'.join(tested[:1])}.kind=tests"
        require(not tested or bool(self.prompts_from), "rlhf.prompts_from", repr(self.prompts_from), accepted)
        require(bool(self.reward_model), "rlhf.reward_model", self.reward_model, "auto, none, or the path of a run")
        # A new critic cannot take the head of a model that is not there.
        headless = self.value_head == "reward_model" and not self.asks_reward_model
        require(not headless, "rlhf.value_head", self.value_head, "zero, as there is no reward model")

        for key in ("pretrain_sequences", "pretrain_seq_len"):
            require(getattr(self, key) > 0, f"rlhf.{key}", getattr(self, key), "a positive integer")
        check_shares("rlhf.pretrain_mix", self.pretrain_mix, own="rlhf.pretrain_corpus")

    def _check_environment(self) -> None:
        """Refuses keys that do not go with rlhf.environment, and those that need it without it.

        Raises:
            ConfigError: names the key, its value and what is accepted.
        """
        kinds = [part.kind for part in self.rewards.values()]
        accepted = "false without rlhf.environment"
        require(bool(self.environment) or not self.asynchronous, "rlhf.asynchronous", "true", accepted)
        if not self.environment:
            require(ENVIRONMENT not in kinds, "rlhf.environment", "''", "a name, for the reward of kind environment")
            return

        listed = ", ".join(self.rewards)
        accepted = "its verdict alone with rlhf.environment: give rlhf.reward_model=none, and no other parts"
        require(kinds == [ENVIRONMENT], "rlhf.rewards", listed, accepted)
        accepted = "a file with the tasks of rlhf.environment, one a row"
        require(bool(self.prompts_from), "rlhf.prompts_from", repr(self.prompts_from), accepted)
        require(not self.ignore_eot, "rlhf.ignore_eot", self.ignore_eot, "false: a turn has an end")
        # A chat template may cut a conversation into several sequences, each with a ratio of its own.
        accepted = "an algorithm with a ratio for each token: " + ", ".join(
            name for name, algorithm in ALGORITHMS.items() if algorithm.ratio_of == "token"
        )
        is_by_token = ALGORITHMS[self.algorithm].ratio_of == "token"
        require(is_by_token, "rlhf.algorithm", self.algorithm, accepted)
        count = self.environments_at_once
        require(count > 0, "rlhf.environments_at_once", count, "a positive integer")
        self.environment_limits.check()
        if self.asynchronous:
            self._check_asynchronous()

    def _check_controller(self) -> None:
        """Refuses what a controller in a process of its own does not do.

        Raises:
            ConfigError: names the key.
        """
        require(self.controller in (RANK, PROCESS), "rlhf.controller", self.controller, f"{RANK} or {PROCESS}")
        if self.controller == RANK:
            return
        way_out = f"with rlhf.controller={PROCESS}; or give rlhf.controller={RANK}"
        require(self.pool.actors != 0, "rlhf.pool.actors", 0, f"actors, or -1 for as many as fit, {way_out}")
        # Weights reach the controller through memory of the node, not from the memory of a rank's GPU.
        require(self.pool.push != PUSH_DIRECT, "rlhf.pool.push", PUSH_DIRECT, f"{PUSH_AUTO} or {PUSH_RAY} {way_out}")

    def _check_asynchronous(self) -> None:
        """Refuses what asynchronous sampling does not do.

        Raises:
            ConfigError: names the key.
        """
        # Conversations of a file are of many iterations, so none can be removed with a checkpoint.
        require(self.keep_conversations, "rlhf.keep_conversations", "false", "true with rlhf.asynchronous")
        # The ranks of an engine, and a direct push, wait for requests to end before weights change.
        require(self.pool.tp == 1, "rlhf.pool.tp", self.pool.tp, "1 with rlhf.asynchronous")
        accepted = f"{PUSH_AUTO} or {PUSH_RAY} with rlhf.asynchronous, which pushes through Ray's object store"
        require(self.pool.push in (PUSH_AUTO, PUSH_RAY), "rlhf.pool.push", self.pool.push, accepted)
        accepted = "disjoint with rlhf.asynchronous, because actors work while the ranks train"
        require(self.pool.placement != SHARED or not self.pool.actors, "rlhf.pool.placement", SHARED, accepted)

    @property
    def environment_file(self) -> Path | None:
        """The file that rlhf.environment names; None: it names none.

        Raises:
            ConfigError: there is no such file.
        """
        file, colon, _ = self.environment.rpartition(":")
        if not colon or not file.endswith(".py") or self.environment.startswith(PROGRAM):
            return None
        path = Path(file).expanduser()
        require(path.is_file(), "rlhf.environment", self.environment, "FILE:CLASS; there is no such file")
        return path

    @property
    def environment_files(self) -> list[Path]:
        """The files that rlhf.environment names: of a class, or in the command of a program.

        Raises:
            ConfigError: there is no such file, or no command.
        """
        if self.environment.startswith(PROGRAM):
            return files_of(self.environment)
        return [self.environment_file] if self.environment_file else []

    @property
    def asks_reward_model(self) -> bool:
        """Whether the reward has a part with kind reward_model."""
        return any(part.kind == "reward_model" for part in self.rewards.values())

    @property
    def constraint_file(self) -> Path | None:
        """The file that rlhf.constraint names; None: it names none.

        Raises:
            ConfigError: there is no such file.
        """
        if not self.constraint or self.constrains_calls:
            return None
        path = Path(self.constraint).expanduser()
        accepted = f"{', '.join(CALL_CONSTRAINTS)}, or a file of JSON; there is no such file"
        require(path.is_file(), "rlhf.constraint", self.constraint, accepted)
        return path

    @property
    def constrains_calls(self) -> bool:
        """Whether the tools of each prompt say what its completions must be."""
        return self.constraint in CALL_CONSTRAINTS

    @property
    def pretrain_corpus_names(self) -> tuple[str, ...]:
        """Names of the corpora of pretraining text; none if its coefficient is 0."""
        if not self.pretrain_coefficient:
            return ()
        return (self.pretrain_corpus, *sorted(self.pretrain_mix))


@dataclass
class RlhfRunConfig(CorpusFormsConfig):
    """The whole configuration of stage `rlhf`."""

    corpus_forms = ("conversation", "ranking")
    without_corpus = ", or prompts from a file: rlhf.prompts_from=FILE"

    stage: TrainingGroup = MISSING
    rlhf: RlhfRunGroup = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        cp = self.parallel.cp
        require(cp == 1, "parallel.cp", cp, "1 in stage rlhf, whose rollouts are not split over ranks")

    @property
    def pool(self) -> RolloutPoolConfig:
        return self.rlhf.pool

    @property
    def engine_shares_device(self) -> bool:
        """Whether an engine uses the memory of the same device as a rank."""
        return self.pool.actors == 0 or self.pool.placement == SHARED

    @property
    def in_turns(self) -> bool:
        """Whether that engine never works while the rank trains, so that its cache is freed meanwhile."""
        return self.engine_shares_device and self.rlhf.max_staleness == 0

    @property
    def takes_sequences(self) -> bool:
        return False

    @property
    def sequence_keys(self) -> tuple[str, str] | None:
        if not self.rlhf.pretrain_coefficient:
            return None
        return "rlhf.pretrain_sequences", "rlhf.pretrain_seq_len"

    @property
    def corpus_names(self) -> tuple[str, ...]:
        # Files of prompts replace the corpus; pretraining text has corpora of its own.
        prompts = () if self.rlhf.prompts_from else self.stage.corpus_names
        return tuple(dict.fromkeys((*prompts, *self.rlhf.pretrain_corpus_names)))

    @property
    def noted_files(self) -> dict[str, list[Path]]:
        # The hashes of these files are recorded, because other prompts would give other rollouts.
        patterns = {f"rlhf.{key}": getattr(self.rlhf, key) for key in ("prompts_from", "held_out_from")}
        prompts = {f"{key}={pattern}": find_rows(pattern, key) for key, pattern in patterns.items() if pattern}
        noted = super().noted_files | prompts
        if constraint_file := self.rlhf.constraint_file:
            noted[f"rlhf.constraint={self.rlhf.constraint}"] = [constraint_file]
        if environment_files := self.rlhf.environment_files:
            noted[f"rlhf.environment={self.rlhf.environment}"] = environment_files

        # Reward functions and constraints of calls see the rows of a corpus, which its tokens do not tell.
        has_function = any(part.kind == "function" for part in self.rlhf.rewards.values())
        if not self.rlhf.prompts_from and (has_function or self.rlhf.constrains_calls):
            corpus = self.corpus_in(WorkDirectory(Path(self.work_dir)), self.stage.corpus)
            if rows := sorted(corpus.glob(f"*{ROWS}")):
                noted[f"rows of stage.corpus={self.stage.corpus}"] = rows
        return noted

    @property
    def trained_models(self) -> int:
        return 1 + self.rlhf.has_critic

    @property
    def ranked_corpora(self) -> frozenset[str]:
        """The configured corpora of rankings.

        Raises:
            ConfigError: a source is invalid.
        """
        return frozenset(corpora_of_form(self.corpus, "ranking"))

    def check_corpus(self, name: str) -> None:
        # Files of prompts replace the corpus, whose name the stage file gives also where there is none.
        if not self.rlhf.prompts_from:
            super().check_corpus(name)

    def check_stage(self) -> None:
        """Refuses answers that fill the context, a cache too small for one sequence, actors of eval.pool, wrong
        pretraining, and what `Config.check_stage` refuses.

        Raises:
            ConfigError: names the key.
        """
        super().check_stage()
        # Rollouts are drawn without dropout, and the base inside the policy, embedding included, is the reference.
        for key, off in (("dropout", "0"), ("tokens", "none")):
            value = getattr(self.stage.lora, key)
            require(not value, f"stage.lora.{key}", value, f"{off} in stage rlhf")
        longest, new = self.model.max_seq_len, self.rlhf.max_new_tokens
        require(new < longest, "rlhf.max_new_tokens", new, f"less than model.max_seq_len={longest}")

        # The cache of an engine must hold at least one whole sequence.
        cached, page = self.rlhf.pool.cache_tokens, self.rlhf.pool.page_tokens
        if not page:
            in_fp32 = self.device == "cpu" or self.parallel.compute_dtype == "fp32"
            page = FEWEST_PAGE_TOKENS if in_fp32 else MOST_PAGE_TOKENS
        accepted = f"whole pages (rlhf.pool.page_tokens={page}) for at least model.max_seq_len={longest} tokens"
        accepted += ", or 0 to take what fits into free memory"
        require(cached == 0 or cached // page * page >= longest, "rlhf.pool.cache_tokens", cached, accepted)

        # The weights of a policy reach one pool only.
        actors = self.eval.pool.actors
        accepted = "0: in stage rlhf the actors of rlhf.pool answer tasks"
        require(actors == 0 or not self.stage.eval_tasks, "eval.pool.actors", actors, accepted)
        accepted = "none with rlhf.asynchronous, whose engines are never free to answer them; evaluate checkpoints"
        has_tasks = bool(self.stage.eval_tasks)
        require(not (self.rlhf.asynchronous and has_tasks), "stage.eval_tasks", self.stage.eval_tasks, accepted)

        self._check_pretraining()

    def _check_pretraining(self) -> None:
        """Refuses corpora that do not exist or hold rankings, a corpus mixed into itself, and sequences longer than the
        model's context; without pretraining it checks nothing.

        Raises:
            ConfigError: names the key.
        """
        settings, longest = self.rlhf, self.model.max_seq_len
        if not settings.pretrain_coefficient:
            return

        # Next-token loss on rankings would teach bad completions like good ones.
        texts = [name for name in self.corpus.corpora if name not in self.ranked_corpora]
        listed = ", ".join(texts)
        accepted = f"a text of corpus={self.corpus.name}: {listed}"
        require(settings.pretrain_corpus in texts, "rlhf.pretrain_corpus", settings.pretrain_corpus, accepted)
        corpus = settings.pretrain_corpus
        accepted = f"texts of corpus={self.corpus.name} beside rlhf.pretrain_corpus={corpus}: {listed}"
        for name in settings.pretrain_mix:
            require(name in texts and name != corpus, "rlhf.pretrain_mix", name, accepted)
        accepted = f"at most model.max_seq_len={longest}"
        require(settings.pretrain_seq_len <= longest, "rlhf.pretrain_seq_len", settings.pretrain_seq_len, accepted)


def rlhf_config(config: Config) -> RlhfRunConfig:
    """Returns `config` with the type of this stage."""
    assert isinstance(config, RlhfRunConfig)
    return config


def check_reward_model(config: RlhfRunConfig, shape: ModelConfig) -> None:
    """Refuses a model that gives no scores, or has another vocabulary than the policy.

    Raises:
        ArtefactError: names the run.
    """
    # Scores need the same token ids as the rollouts.
    if shape.head != "scalar" or shape.vocab_size != config.model.vocab_size:
        raise ArtefactError(
            f"rlhf.reward_model={config.rlhf.reward_model}: its model has model.head={shape.head} and "
            f"{shape.vocab_size} tokens; expected a run of stage reward with this tokenizer"
        )
