"""The conf group `rlhf`: rollouts, rewards and updates of an iteration, and the pool of actors that draws rollouts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from dist_lm.errors import require

_CRITIC = {
    "value_lr": None,
    "value_clip": 0.2,
    "value_head": "zero",
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_rewards": False,
    "whiten_advantages": True,
}
_PENALISED = {"missing_eos_penalty": 1.0}
_GROUP = {"samples": 8, "epochs": 1}
READ: Mapping[str, Mapping[str, Any]] = {
    "ppo": {
        "samples": 1,
        "epochs": 4,
        "clip": 0.2,
        "kl_coefficient": 0.05,
        **_PENALISED,
        **_CRITIC,
        "kl_estimate": "k1",
    },
    "grpo": {**_GROUP, "clip": 0.2, "kl_coefficient": 0.04, **_PENALISED},
    "dr_grpo": {**_GROUP, "clip": 0.2, "kl_coefficient": 0.0, **_PENALISED},
    "rloo": {**_GROUP, "clip": 0.2, "kl_coefficient": 0.05, **_PENALISED, "kl_estimate": "k1"},
    "reinforce_pp": {
        **{"samples": 1, "epochs": 1, "clip": 0.2, "kl_coefficient": 0.01},
        **_PENALISED,
        "kl_estimate": "k1",
    },
    "dapo": {
        **_GROUP,
        **{"clip": 0.2, "clip_high": 0.28, "kl_coefficient": 0.0},
        **{"overlong_tokens": None, "sampling_rounds": 8},
    },
    "gspo": {**_GROUP, "clip": 3e-4, "clip_high": 4e-4, "kl_coefficient": 0.0, **_PENALISED},
}
"""algorithm -> the keys that not all algorithms read, or whose default is its own, with that default. A default of
None is computed from other keys (see RlhfConfig)."""
ALGORITHMS = tuple(READ)
RATIO_OF = {"rloo": "completion", "gspo": "mean"}
"""algorithm -> what its probability ratios are of, where that is no token: see `truncated_importance`."""
VALUE_RATE = 3  # the critic's learning rate / the policy's
VALUE_HEADS = ("zero", "reward_model")
KL_ESTIMATES = ("k1", "k2", "k3")
REWARD_KINDS = ("reward_model", "length", "parses", "function", "tests")
TEST_SCORES = ("share", "all")
PARSED_LANGUAGES = ("python", "bash", "sql")
DISJOINT, SHARED = "disjoint", "shared"
FEWEST_PAGE_TOKENS, MOST_PAGE_TOKENS = 64, 256  # of a page whose size is chosen: on CPUs, on CUDA in half precision
PUSH_AUTO, PUSH_RAY, PUSH_DIRECT = "auto", "ray", "direct"
AS_MANY = -1
Given = TypeVar("Given")
CACHE_SHARE = {"cuda": 0.85, "cpu": 0.25}
"""Part of the free memory that an automatic cache takes. Engines on CPUs of one node share its memory."""


@dataclass
class RewardPartConfig:
    """One part of the reward of a rollout."""

    kind: str = ""  # reward_model | length | parses | function | tests
    weight: float = 1.0  # in the sum of all parts
    target: int = 0  # length: tokens of a completion with reward 1; the reward falls to 0 at 0 and at twice as many
    language: str = "python"  # parses: python | bash | sql; 1 if the text parses, else 0
    of: str = "document"  # parses: document (request and completion as one text) | completion
    function: str = ""  # function: 'package.module:name', called as name(request, completion) -> float
    timeout_s: float = 10.0  # function: limit of a call
    score: str = "share"  # tests: share of the tests passed | all: 1 if all passed, else 0
    cpu_s: float = 0.5  # tests: limit of a completion's tests together
    wall_s: float = 4.0  # tests: the same by the clock
    workers: int = 0  # tests: programs at once on a node; 0: one for each of its cores

    def check(self, key: str) -> None:
        """Refuse values out of bounds; `key` is the config key of this part."""
        require(self.kind in REWARD_KINDS, f"{key}.kind", self.kind, ", ".join(REWARD_KINDS))
        require(math.isfinite(self.weight), f"{key}.weight", self.weight, "a finite number")
        if self.kind == "length":
            require(self.target > 0, f"{key}.target", self.target, "a positive number of tokens")
        if self.kind == "parses":
            require(self.language in PARSED_LANGUAGES, f"{key}.language", self.language, ", ".join(PARSED_LANGUAGES))
            require(self.of in ("document", "completion"), f"{key}.of", self.of, "document or completion")
        if self.kind == "tests":
            require(self.score in TEST_SCORES, f"{key}.score", self.score, ", ".join(TEST_SCORES))
            for name, seconds in (("cpu_s", self.cpu_s), ("wall_s", self.wall_s)):
                require(0 < seconds < math.inf, f"{key}.{name}", seconds, "a positive number of seconds")
            require(self.workers >= 0, f"{key}.workers", self.workers, "a positive integer, or 0 to choose")
        if self.kind == "function":
            module, colon, name = self.function.partition(":")
            holds = bool(module and colon and name)
            require(holds, f"{key}.function", self.function, "package.module:function")
            seconds = self.timeout_s
            require(0 < seconds < math.inf, f"{key}.timeout_s", seconds, "a positive number of seconds")


@dataclass
class RlhfConfig:
    """An iteration: rollouts for a batch of prompts, their rewards, then `epochs` passes of updates over them.

    A key that defaults to null takes the value of its algorithm in `READ`. It stays null, and must, if the algorithm
    does not read it.
    """

    name: str = "ppo"
    algorithm: str = "ppo"
    # rollouts
    prompts: int = 64  # per iteration
    samples: int | None = None  # rollouts per prompt: the group
    max_new_tokens: int = 128
    sampling_rounds: int | None = (
        None  # draws of an iteration, at most, to replace groups whose scores are all the same
    )
    temperature: float = 1.0  # divides the logits in sampling and in every log-probability pass
    # draw only from the k likeliest tokens (0: off), and from the smallest set with this much probability (1: off);
    # log-probabilities, entropy and KL are then of the distribution over the tokens kept, here and in training
    top_k: int = 0
    top_p: float = 1.0
    ignore_eot: bool = False  # no token ends a completion: all have max_new_tokens
    max_staleness: int = 0  # largest age of a rollout's weights in iterations; 0: generate, then train
    importance_cap: float = 2.0  # largest ratio of trainer to engine probability that weighs a token; 0: off
    # updates
    epochs: int | None = None  # passes over the rollouts of an iteration; stop_kl may end them earlier
    minibatches: int = 1  # optimizer steps per pass
    micro_batch_tokens: int = 8192  # of a rank's micro-batch, at most; more if one sequence is longer
    lr: float = 1e-6  # of the policy
    value_lr: float | None = None  # of the critic; null: VALUE_RATE x lr
    warmup_iterations: int = 0
    min_lr_ratio: float = 1.0  # final learning rate / peak, by a cosine; 1: constant
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-5
    grad_clip: float = 1.0  # largest global gradient norm; 0: off
    max_nonfinite_updates: int = 10  # consecutive updates with NaN/inf gradients before the run stops
    clip: float | None = None  # distance of the ratio from 1 beyond which the gain is cut off
    clip_high: float | None = None  # the same above 1, where `clip` holds below
    overlong_tokens: int | None = None  # last tokens over which the score falls by 1; null: max_new_tokens / 5; 0: off
    value_clip: float | None = None  # distance from the old value beyond which the loss no longer falls
    gamma: float | None = None  # discount per token
    lam: float | None = None  # lambda of generalised advantage estimation
    kl_coefficient: float | None = None  # weight of the KL from the reference, per token
    kl_estimate: str | None = None  # k1 | k2 | k3
    kl_target: float | None = None  # nats per sequence to which the adaptive coefficient steers; null: fixed
    kl_horizon: int = 10_000  # rollouts within which the coefficient may change by about 20 %
    entropy_coefficient: float = 0.0  # weight of the entropy bonus of each token's distribution
    whiten_rewards: bool | None = None  # scale token rewards to standard deviation 1; the mean stays
    whiten_advantages: bool | None = None  # to mean 0 and standard deviation 1 over all tokens of an iteration
    stop_kl: float = 0.0  # mean KL per token (nats) from the start of the iteration that ends its updates; 0: off
    pretrain_coefficient: float = 0.0  # weight of the mean next-token loss on pretraining text; 0: off
    value_head: str | None = None  # a new critic's head: zero | reward_model
    # rewards
    rewards: dict[str, RewardPartConfig] = field(default_factory=dict)  # parts by name; the score is their weighted sum
    # largest share of an iteration's rollouts whose function (or other rule) may fail; they are left out
    max_failed_fraction: float = 0.05
    missing_eos_penalty: float | None = None  # subtracted from the score of a completion that was cut off
    normalise_reward: bool = True  # scale the reward model's scores to mean 0, std 1 on samples of the reference

    def __post_init__(self) -> None:
        require(self.algorithm in READ, "rlhf.algorithm", self.algorithm, ", ".join(ALGORITHMS))
        self._fill_nulls()
        for key in (
            *("prompts", "samples", "max_new_tokens", "epochs", "minibatches", "micro_batch_tokens"),
            *("max_nonfinite_updates", "kl_horizon"),
        ):
            require(getattr(self, key) > 0, f"rlhf.{key}", getattr(self, key), "a positive integer")
        for key in self._read("sampling_rounds"):
            require(getattr(self, key) > 0, f"rlhf.{key}", getattr(self, key), "a positive integer; 1: drawn once")
        for key in self._read("temperature", "lr", "value_lr", "adam_eps", "clip", "clip_high", "value_clip"):
            require(0 < getattr(self, key) < math.inf, f"rlhf.{key}", getattr(self, key), "a positive number")
        for key in self._read(
            *("max_staleness", "warmup_iterations", "weight_decay", "grad_clip", "kl_coefficient"),
            *("entropy_coefficient", "stop_kl", "pretrain_coefficient", "missing_eos_penalty", "importance_cap"),
            "overlong_tokens",
        ):
            require(0 <= getattr(self, key) < math.inf, f"rlhf.{key}", getattr(self, key), "0 or a positive number")
        require(self.top_k >= 0, "rlhf.top_k", self.top_k, "a positive integer, or 0 (off)")
        require(0 < self.top_p <= 1, "rlhf.top_p", self.top_p, "in (0, 1]; 1 is off")
        for key in self._read("gamma", "lam", "min_lr_ratio", "max_failed_fraction"):
            require(0 <= getattr(self, key) <= 1, f"rlhf.{key}", getattr(self, key), "in [0, 1]")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"rlhf.{key}", getattr(self, key), "in [0, 1)")
        for key, accepted in (("kl_estimate", KL_ESTIMATES), ("value_head", VALUE_HEADS)):
            value = getattr(self, key)
            require(value in (None, *accepted), f"rlhf.{key}", value, ", ".join(accepted))
        target = self.kl_target
        require(target is None or 0 < target < math.inf, "rlhf.kl_target", target, "a positive number, or null")
        require(
            target is None or given(self.kl_coefficient) > 0,
            "rlhf.kl_coefficient",
            self.kl_coefficient,
            f"a positive number to begin with: rlhf.kl_target={target} only multiplies it",
        )
        if self.overlong_tokens is not None:
            accepted = f"at most rlhf.max_new_tokens={self.max_new_tokens}"
            require(self.overlong_tokens <= self.max_new_tokens, "rlhf.overlong_tokens", self.overlong_tokens, accepted)
        fewest = min(2, READ[self.algorithm]["samples"])
        accepted = f"at least {fewest}: rlhf.algorithm={self.algorithm} compares the rollouts of a prompt"
        require(self.group >= fewest, "rlhf.samples", self.samples, accepted)
        rollouts = self.prompts * self.group
        require(
            self.minibatches <= rollouts,
            "rlhf.minibatches",
            self.minibatches,
            f"at most the {rollouts} rollouts of an iteration (rlhf.prompts x rlhf.samples)",
        )
        for name, part in self.rewards.items():
            part.check(f"rlhf.rewards.{name}")

    @property
    def has_critic(self) -> bool:
        """Whether the algorithm trains a value model."""
        return "value_lr" in READ[self.algorithm]

    @property
    def group(self) -> int:
        """Rollouts of a prompt."""
        return given(self.samples)

    def _fill_nulls(self) -> None:
        """Give the keys that the algorithm reads its defaults; refuse values for keys that it does not read."""
        own = READ[self.algorithm]
        for key in sorted({key for keys in READ.values() for key in keys}):
            value = getattr(self, key)
            if key in own:
                setattr(self, key, own[key] if value is None else value)
                continue
            readers = ", ".join(name for name, keys in READ.items() if key in keys)
            accepted = f"null: rlhf.algorithm={self.algorithm} does not read it (read by {readers})"
            require(value is None, f"rlhf.{key}", value, accepted)
        if self.has_critic and self.value_lr is None:
            self.value_lr = float(f"{VALUE_RATE * self.lr:.9g}")  # without the last digits of a product
        if "overlong_tokens" in own and self.overlong_tokens is None:
            self.overlong_tokens = self.max_new_tokens // 5  # a fifth of the limit, as in the paper

    def _read(self, *keys: str) -> list[str]:
        """Those of the keys that have a value."""
        return [key for key in keys if getattr(self, key) is not None]


def given(value: Given | None) -> Given:
    """The value of a key that the algorithm reads."""
    assert value is not None, "a key that the algorithm does not read"
    return value


@dataclass
class RolloutPoolConfig:
    """Number, placement and size of the engines that generate rollouts."""

    key: ClassVar[str] = "rlhf.pool"  # for messages
    without: ClassVar[str] = "generates in the process of the first rank"  # what KEY.actors=0 does
    may_share: ClassVar[bool] = True  # whether placement may be shared

    # engines, each in its own Ray actor; 0: one engine in the process of the first rank; -1, with placement shared: one
    # for each `tp` GPUs of the ranks, or one per node without GPUs
    actors: int = 1
    # disjoint: actors have their own GPUs, or without GPUs a share of the cores; shared: actors and ranks use the same
    # GPUs and cores in turns
    placement: str = DISJOINT
    tp: int = 1  # GPUs that share the model of an engine
    # KV cache of an engine, all sequences together; 0: what fits into free memory (CACHE_SHARE), and at most
    # max_sequences whole contexts
    cache_tokens: int = 0
    page_tokens: int = 0  # of a page of the cache; 0: 256 on CUDA in half precision, otherwise 64
    max_sequences: int = 64  # at a time in an engine
    # way of new weights: ray: Ray's object store; direct: NCCL broadcast, or CUDA IPC where rank 0 and actor share a
    # GPU (without GPUs gloo, or shared memory inside a node), and Ray's store where that fails; auto: direct with GPUs
    push: str = PUSH_AUTO

    def __post_init__(self) -> None:
        accepted = f"0 (the first rank generates), a positive integer, or -1 with {self.key}.placement=shared"
        may_be_all = self.actors == AS_MANY and self.placement == SHARED
        require(self.actors >= 0 or may_be_all, f"{self.key}.actors", self.actors, accepted)
        require(
            self.placement in (DISJOINT, SHARED), f"{self.key}.placement", self.placement, f"{DISJOINT} or {SHARED}"
        )
        ways = (PUSH_AUTO, PUSH_RAY, PUSH_DIRECT)
        require(self.push in ways, f"{self.key}.push", self.push, ", ".join(ways))
        for key in ("tp", "max_sequences"):
            require(getattr(self, key) > 0, f"{self.key}.{key}", getattr(self, key), "a positive integer")
        pages = self.page_tokens
        require(pages >= 0, f"{self.key}.page_tokens", pages, "a positive integer, or 0 to choose")
        require(
            self.cache_tokens == 0 or self.cache_tokens >= (pages or FEWEST_PAGE_TOKENS),
            f"{self.key}.cache_tokens",
            self.cache_tokens,
            f"at least {self.key}.page_tokens={pages or FEWEST_PAGE_TOKENS}, or 0 to take what fits into free memory",
        )
