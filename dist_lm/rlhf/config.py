"""The conf group `rlhf`: rollouts, rewards and updates of an iteration, whatever the algorithm.

The keys that only some algorithms read are declared beside their losses (`dist_lm/rlhf/algorithms`); `RlhfConfig` has
them too, as null. Defaults are those here and there, unless `conf/stage/rlhf.yaml` or a recipe sets another value. The
keys of a whole run are in `dist_lm/stages/rlhf/config.py`, those of the engines in `dist_lm/config/pool.py`. No torch:
the launcher reads this file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, TypeVar, get_type_hints

from dist_lm.config.stage import OptimizerConfig, SamplingConfig
from dist_lm.environments.protocol import LARGEST_REWARD
from dist_lm.errors import require
from dist_lm.rlhf.algorithm import AlgorithmKeys
from dist_lm.rlhf.algorithms.registry import ALGORITHMS

ENVIRONMENT = "environment"  # the kind of part that is the verdict of an environment
REWARD_KINDS = ("reward_model", "length", "parses", "function", "tests", ENVIRONMENT)
TEST_SCORES = ("share", "all")
# Values of `constraint` that name no file: the tools of each prompt say what its calls must be.
CALLS, REQUIRED_CALLS, ONE_CALL = "calls", "required_calls", "one_call"
CALL_CONSTRAINTS = (CALLS, REQUIRED_CALLS, ONE_CALL)
PARSED_LANGUAGES = ("python", "bash", "sql")
Value = TypeVar("Value")


@dataclass
class RewardPartConfig:
    """One part of the reward of a rollout."""

    kind: str = ""  # reward_model | length | parses | function | tests | environment
    weight: float = 1.0  # factor in the sum of all parts
    target: int = 0  # length: tokens with reward 1; it falls linearly to 0 at no tokens and at twice as many
    language: str = "python"  # parses: python | bash | sql; 1 if the text parses, else 0
    of: str = "document"  # parses: document (request and completion as one text) | completion
    # function: 'package.module:name' of name(request, completion) -> float, or of a form of TRL or verl
    # (`reward_forms.py`)
    function: str = ""
    timeout_s: float = 10.0  # function: limit of a call in seconds; of a call with n completions n times as much
    score: str = "share"  # tests: share of the tests passed | all: 1 if all passed, else 0
    cpu_s: float = 0.5  # tests: CPU seconds of a completion's tests, all together
    wall_s: float = 4.0  # tests: the same limit by the clock
    workers: int = 0  # tests: programs at a time on a node; 0: one for each of its cores

    def check(self, key: str) -> None:
        """Refuses values out of bounds of the keys that this kind of part reads.

        Args:
            key: name of this part in the configuration, for messages.

        Raises:
            ConfigError: names the key, the value and what is accepted.
        """
        require(self.kind in REWARD_KINDS, f"{key}.kind", self.kind, ", ".join(REWARD_KINDS))
        is_fp32 = abs(self.weight) <= LARGEST_REWARD  # false for NaN
        require(is_fp32, f"{key}.weight", self.weight, "a number within the range of fp32")

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
            is_path = bool(module and colon and name)
            require(is_path, f"{key}.function", self.function, "package.module:function")
            seconds = self.timeout_s
            require(0 < seconds < math.inf, f"{key}.timeout_s", seconds, "a positive number of seconds")


@dataclass
class IterationConfig(OptimizerConfig, SamplingConfig):
    """An iteration: rollouts for a batch of prompts, their rewards, then `epochs` passes of updates over them.

    A null key takes the default of the algorithm. A key that the algorithm does not read must be null.
    """

    algorithm: str = "ppo"
    # rollouts. Keys of `SamplingConfig`: `temperature` divides the logits in every log-probability pass too; with
    # `top_k` and `top_p`, log-probabilities, entropy and KL are those of the distribution over the allowed tokens
    prompts: int = 64  # per iteration
    samples: int | None = None  # rollouts per prompt: the group
    # largest number of draws of an iteration, to replace groups whose scores are all the same
    sampling_rounds: int | None = None
    ignore_eot: bool = False  # no token ends a completion: all have max_new_tokens
    # what completions must be (`generation/constraint.py`); log-probabilities, entropy and KL are those of the
    # distribution over the allowed tokens. calls: each call fits a tool of the prompt; required_calls: and
    # wherever there are tools, there is nothing but calls, one or more; one_call: exactly one; or a file of JSON, an
    # object with one of json_schema, regex, lark and choice; empty: anything
    constraint: str = ""
    # sampling goes on while the learner updates, and an iteration takes the groups that finish first; weights change
    # in the middle of answers (`asynchronous.py`). Only with rlhf.environment
    asynchronous: bool = False
    # largest age of a rollout's weights in iterations; 0: generate, then train. With rlhf.asynchronous the largest age
    # of the weights that drew the first token of a group
    max_staleness: int = 0
    importance_cap: float = 2.0  # cap of the importance weight, trainer / engine probability; 0: no weights
    # updates
    epochs: int | None = None  # passes over the rollouts of an iteration; stop_kl may end them earlier
    minibatches: int = 1  # optimizer steps per pass
    micro_batch_tokens: int = 8192  # largest micro-batch of a rank in tokens; more if one sequence is longer
    # keys of AdamW: `beta1`, `beta2` and `grad_clip` have the defaults of `OptimizerConfig`
    lr: float = 1e-6  # learning rate of the policy
    value_lr: float | None = None  # learning rate of the critic
    warmup_iterations: int = 0
    min_lr_ratio: float = 1.0  # final learning rate / peak, by a cosine; 1: constant
    weight_decay: float = 0.0
    adam_eps: float = 1e-5
    max_nonfinite_updates: int = 10  # consecutive updates with NaN/inf gradients before the run stops
    kl_coefficient: float | None = None  # weight of the KL from the reference, per token
    kl_target: float | None = None  # nats per sequence to which the adaptive coefficient steers; null: fixed
    kl_horizon: int = 10_000  # rollouts within which the coefficient may change by about 20 %
    entropy_coefficient: float = 0.0  # weight of the entropy bonus of each token's distribution
    stop_kl: float = 0.0  # mean KL per token (nats) from the start of the iteration that ends its updates; 0: off
    pretrain_coefficient: float = 0.0  # weight of the mean next-token loss on pretraining text; 0: off
    value_head: str | None = None  # a new critic's head: zero | reward_model
    # rewards
    rewards: dict[str, RewardPartConfig] = field(default_factory=dict)  # parts by name; the score is their weighted sum
    # largest share of an iteration's rollouts whose function (or other rule) may fail; they are left out
    max_failed_fraction: float = 0.05
    missing_eos_penalty: float | None = None  # subtracted from the score of a completion that was cut off
    # scale the reward model's scores to mean 0, std 1 on samples of the reference policy, as stage reward measured them
    normalise_reward: bool = True


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    name: {key.name: key.default for key in fields(algorithm.Keys)} for name, algorithm in ALGORITHMS.items()
}
"""algorithm -> its keys with their defaults. A default of None is computed by `AlgorithmKeys.complete`."""


def _nullable_keys() -> list[tuple[str, Any, Any]]:
    """Returns the algorithm keys that `IterationConfig` does not declare, as fields (name, type, default None)."""
    common = {key.name for key in fields(IterationConfig)}
    type_of_key: dict[str, Any] = {}
    for algorithm in ALGORITHMS.values():
        hints = get_type_hints(algorithm.Keys)
        for name in (key.name for key in fields(algorithm.Keys) if key.name not in common):
            # The configuration has a key once, so all algorithms that read it must agree on its type.
            declared = type_of_key.setdefault(name, hints[name])
            assert declared == hints[name], f"{algorithm.__name__}: another algorithm has {name} as {declared}"
    return [(name, declared | None, field(default=None)) for name, declared in type_of_key.items()]


_KeysOfAlgorithms: Any = make_dataclass("_KeysOfAlgorithms", _nullable_keys())


@dataclass
class RlhfConfig(_KeysOfAlgorithms, IterationConfig):
    """An iteration with the keys of its algorithm (`AlgorithmKeys`), those of other algorithms being null."""

    def __post_init__(self) -> None:
        """Reads the keys of the algorithm into its own dataclass, and refuses values and combinations that do not fit.

        Raises:
            ConfigError: names the key, its value and what is accepted.
        """
        require(self.algorithm in ALGORITHMS, "rlhf.algorithm", self.algorithm, ", ".join(ALGORITHMS))
        self._read_keys_of_algorithm()
        self._check_bounds()

        # The adaptive controller multiplies the coefficient, so 0 would stay 0.
        accepted = f"a positive number to begin with: rlhf.kl_target={self.kl_target} only multiplies it"
        has_coefficient = not_null(self.kl_coefficient) > 0
        require(has_coefficient or self.kl_target is None, "rlhf.kl_coefficient", self.kl_coefficient, accepted)

        fewest = ALGORITHMS[self.algorithm].Keys.fewest_samples
        accepted = f"at least {fewest}: rlhf.algorithm={self.algorithm} compares the rollouts of a prompt"
        require(self.rollouts_per_prompt >= fewest, "rlhf.samples", self.samples, accepted)

        # A completion with a constraint ends where that is fulfilled.
        accepted = f"false with rlhf.constraint={self.constraint}"
        require(not (self.constraint and self.ignore_eot), "rlhf.ignore_eot", self.ignore_eot, accepted)

        # The learner would wait for every group, and asynchronous sampling would be none.
        accepted = "1 or more with rlhf.asynchronous"
        require(not self.asynchronous or self.max_staleness > 0, "rlhf.max_staleness", self.max_staleness, accepted)
        accepted = "0 with rlhf.asynchronous, where iterations take the groups that finish first"
        is_built = not (self.asynchronous and self.sampling_rounds)
        require(is_built, "rlhf.sampling_rounds", self.sampling_rounds, accepted)

        # Every update needs a rollout.
        rollouts = self.rollouts_per_iteration
        accepted = f"at most the {rollouts} rollouts of an iteration (rlhf.prompts x rlhf.samples)"
        require(self.minibatches <= rollouts, "rlhf.minibatches", self.minibatches, accepted)

        for name, part in self.rewards.items():
            part.check(f"rlhf.rewards.{name}")
        weights = {name: part.weight for name, part in self.rewards.items()}
        is_fp32 = sum(map(abs, weights.values())) + (self.missing_eos_penalty or 0.0) <= LARGEST_REWARD
        require(is_fp32, "rlhf.rewards", weights, "weights whose sum, with rlhf.missing_eos_penalty, is within fp32")

    @property
    def has_critic(self) -> bool:
        """Whether the algorithm trains a value model."""
        return ALGORITHMS[self.algorithm].has_critic

    @property
    def rollouts_per_prompt(self) -> int:
        """Rollouts that algorithms compare with each other: `samples`, whose default is the algorithm's."""
        return not_null(self.samples)

    @property
    def rollouts_per_iteration(self) -> int:
        """Rollouts of all prompts of an iteration."""
        return self.prompts * self.rollouts_per_prompt

    @property
    def drawing_staleness(self) -> int:
        """Versions between the weights that draw an iteration and the policy, once the run has so many.

        It is `max_staleness`. Asynchronous sampling goes on by whatever weights there are, so with it 0; there,
        `max_staleness` only bounds the age of a group.
        """
        return 0 if self.asynchronous else self.max_staleness

    @property
    def largest_kl_weight(self) -> float:
        """Cap of the importance of a token in the KL penalty, which tokens of older weights always have: without
        `importance_cap` there is no cap."""
        return self.importance_cap or math.inf

    @property
    def algorithm_keys(self) -> AlgorithmKeys:
        """The keys that the algorithm reads, without nulls."""
        return self._algorithm_keys

    def _read_keys_of_algorithm(self) -> None:
        """Replaces nulls by the algorithm's defaults; keeps the keys as `algorithm_keys`.

        Raises:
            ConfigError: a key that the algorithm does not read is not null, a value is out of bounds, or keys
                contradict each other.
        """
        defaults = DEFAULTS[self.algorithm]
        for key in sorted({key for keys in DEFAULTS.values() for key in keys}):
            value = getattr(self, key)
            if key not in defaults:
                readers = ", ".join(name for name, keys in DEFAULTS.items() if key in keys)
                accepted = f"null: rlhf.algorithm={self.algorithm} does not read it (read by {readers})"
                require(value is None, f"rlhf.{key}", value, accepted)
            elif value is None:
                setattr(self, key, defaults[key])

        keys = ALGORITHMS[self.algorithm].Keys(**{key: getattr(self, key) for key in defaults})
        for key in fields(keys):
            value, bounds = getattr(keys, key.name), key.metadata.get("bounds")
            if bounds and value is not None:
                require(bounds.accepts(value), f"rlhf.{key.name}", value, bounds.accepted)

        # Defaults that depend on other keys come last: they need values within bounds.
        keys.complete(self)
        for key in fields(keys):
            setattr(self, key.name, getattr(keys, key.name))
        self._algorithm_keys = keys

    def _check_bounds(self) -> None:
        """Checks the keys that all algorithms read, each against its own bounds.

        Raises:
            ConfigError: a value is out of bounds; names the first such key, its value and what is accepted.
        """
        for key in ("prompts", "max_new_tokens", "minibatches", "micro_batch_tokens"):
            require(getattr(self, key) > 0, f"rlhf.{key}", getattr(self, key), "a positive integer")
        for key in ("max_nonfinite_updates", "kl_horizon"):
            require(getattr(self, key) > 0, f"rlhf.{key}", getattr(self, key), "a positive integer")
        self.check_optimizer("rlhf")
        require(0 < self.temperature < math.inf, "rlhf.temperature", self.temperature, "a positive number")
        for key in (
            *("max_staleness", "warmup_iterations", "importance_cap"),
            *("entropy_coefficient", "stop_kl", "pretrain_coefficient"),
        ):
            require(0 <= getattr(self, key) < math.inf, f"rlhf.{key}", getattr(self, key), "0 or a positive number")

        require(self.top_k >= 0, "rlhf.top_k", self.top_k, "a positive integer, or 0 (off)")
        require(0 < self.top_p <= 1, "rlhf.top_p", self.top_p, "in (0, 1]; 1 is off")
        require(0 <= self.max_failed_fraction <= 1, "rlhf.max_failed_fraction", self.max_failed_fraction, "in [0, 1]")
        target = self.kl_target
        require(target is None or 0 < target < math.inf, "rlhf.kl_target", target, "a positive number, or null")


def not_null(value: Value | None) -> Value:
    """Returns the value of a key that the algorithm reads."""
    assert value is not None, "a key that the algorithm does not read"
    return value
