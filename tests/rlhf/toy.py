"""A policy of two layers that learns in seconds, a second algorithm, hand-made rollouts, and a corpus of text."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import ModelConfig
from dist_lm.document import TokenizedDocument
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.model.keyed_random import initial_value
from dist_lm.model.quantised import quantised_matrices
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.parallel.values import whole_weights
from dist_lm.rlhf.algorithm import Algorithm, DrawnTokens, Experience, Prepared
from dist_lm.rlhf.algorithms.registry import ALGORITHMS
from dist_lm.rlhf.config import RewardPartConfig, RlhfConfig, not_null
from dist_lm.rlhf.controller import Controller, RolloutSupply
from dist_lm.rlhf.learner import IterationReport, Learner
from dist_lm.rlhf.models import RlhfModels, start_critic, trained
from dist_lm.rlhf.rewards import Judge
from dist_lm.rlhf.rollouts import FINISHES, EngineRollouts, Rollouts, RolloutSource, ShuffledPrompts
from dist_lm.rlhf.state import KlController, RlhfState
from dist_lm.training.objective import LossSum
from dist_lm.training.optimizer import named_state
from tests.data.synthetic_corpus import write
from tests.rlhf.toy_rewards import FIRST, VOCABULARY

# --- a policy of two layers that learns in seconds, with all the parts of a run, on the ranks of a process group ---


EOT = 0
WORLD = World(0, 1, 0, torch.device("cpu"))

MODEL = ModelConfig(
    name="toy", d_model=64, n_layers=2, n_heads=4, d_ff=256, max_seq_len=64, vocab_size=VOCABULARY, init_std=0.05
)
PROMPTS = [[EOT, 1 + i % 9, 10 + i % 7, 20 + i % 5] for i in range(315)]

TOKENS = RlhfConfig(  # more of some tokens
    prompts=64,
    max_new_tokens=16,
    ignore_eot=True,
    lr=1e-3,
    value_lr=1e-3,
    kl_coefficient=0.0,
    missing_eos_penalty=0.0,
    rewards={"tokens": RewardPartConfig(kind="function", function="tests.rlhf.toy_rewards:share_of_low_tokens")},
)
LENGTH = replace(  # completions of a length
    TOKENS,
    max_new_tokens=32,
    ignore_eot=False,
    rewards={"length": RewardPartConfig(kind="length", target=12)},
)


def decode(tokens: list[int]) -> str:
    """Returns a text with one character for each token."""
    return "".join(chr(FIRST + token) for token in tokens)


def supply_of(config: RlhfConfig, source: RolloutSource, seed: int, stop_tokens: tuple[int, ...]) -> RolloutSupply:
    """Returns prompts, source and rules. Processes of the rules end with this one."""
    judge = Judge(config.rewards, decode, config.max_failed_fraction)
    return RolloutSupply(source, ShuffledPrompts(PROMPTS, seed), judge, stop_tokens)


@dataclass
class Toy:
    """A learner, where it begins, and what it reports."""

    learner: Learner
    state: RlhfState
    reports: list[IterationReport] = field(default_factory=list)
    saved: list[RlhfState] = field(default_factory=list)

    def run(self) -> RlhfState:
        return self.learner.run(self.state)

    def metric(self, name: str) -> list[float]:
        return [report.metrics[name] for report in self.reports]


def engine_of(model: ModelConfig = MODEL) -> Engine:
    """Returns an engine with random weights: the learner pushes others before it asks."""
    weights = {name: value for name, value in Transformer(model).state_dict().items()}
    options = EngineOptions(cache_tokens=64 * 64, page_tokens=64, max_sequences=64)
    return Engine(model, weights, eot_id=EOT, options=options)


def toy(
    config: RlhfConfig,
    iterations: int,
    *,
    seed: int = 0,
    world: World = WORLD,
    parallel: ParallelConfig | None = None,
    model: ModelConfig = MODEL,
    algorithm: Algorithm | None = None,
    source: Callable[[], RolloutSource] = lambda: EngineRollouts(engine_of()),
    reference: bool = True,
    reward_model: bool = False,
    stop_tokens: tuple[int, ...] = (),
    **options: Any,
) -> Toy:
    """Builds all parts on the mesh that `parallel` asks for (collective)."""
    parallel = parallel or ParallelConfig()
    algorithm = algorithm or ALGORITHMS[config.algorithm](config)
    mesh = build_mesh(resolve_layout(parallel, model, world.size), world.device)

    def build(shape: ModelConfig, own_seed: int = seed) -> Transformer:
        built = build_model(shape, parallel, mesh, world.device, own_seed)
        for name, matrix in quantised_matrices(built).items():
            matrix.quantise(initial_value(name, tuple(matrix.shape), shape, own_seed))
        return built

    policy, reward = build(model), build(replace(model, head="scalar"), seed + 1) if reward_model else None
    critic = None
    if algorithm.has_critic:
        critic = build(replace(model, head="scalar"))
        start_critic(critic, reward or policy, not_null(config.value_head))
    controller = None
    if world.is_first:
        controller = Controller(supply_of(config, source(), seed, stop_tokens), config, seed, iterations)
    learner = Learner(
        config=config,
        seed=seed,
        iterations=iterations,
        world=world,
        mesh=mesh,
        parallel=parallel,
        models=RlhfModels(
            policy=trained(policy, config, config.lr),
            critic=trained(critic, config, not_null(config.value_lr)) if critic else None,
            reference=build(model).requires_grad_(False) if reference else None,
            reward=reward.requires_grad_(False) if reward else None,
        ),
        algorithm=algorithm,
        controller=controller,
        **options,
    )
    run = Toy(learner, RlhfState(KlController.of(config)))
    run.learner = replace(learner, report=run.reports.append, save=run.saved.append)
    return run


def supply_in(made: Toy) -> Any:
    """Returns what draws and judges the rollouts of a toy, on the first rank."""
    assert isinstance(made.learner.controller, Controller)
    return made.learner.controller.supply


def with_supply(made: Toy, supply: Any) -> None:
    """Lets another supply draw and judge the rollouts of a toy."""
    assert isinstance(made.learner.controller, Controller)
    made.learner = replace(made.learner, controller=replace(made.learner.controller, supply=supply))


def weights_of(trained: Toy) -> dict[str, torch.Tensor]:
    """Returns the unsharded weights of the policy (collective)."""
    model = trained.learner.models.policy.model
    return {name: value.clone() for name, value in whole_weights(model, model.config, torch.float32).items()}


def tensors_of(made: Toy) -> dict[str, torch.Tensor]:
    """Returns the tensors of models and optimizers that a checkpoint holds."""
    models = made.learner.models
    return {
        f"{role}.{name}": value
        for role, trained in (("policy", models.policy), ("critic", models.critic))
        if trained
        for name, value in [
            *((name, parameter.detach()) for name, parameter in trained.model.named_parameters()),
            *named_state(trained.model, trained.optimizer),
        ]
    }


@dataclass(frozen=True)
class Saved:
    """A toy after an iteration, as a checkpoint holds it."""

    values: str  # JSON
    arrays: bytes  # safetensors
    tensors: dict[str, torch.Tensor]


def saving(made: Toy) -> dict[int, Saved]:
    """Lets a toy save itself after each iteration; the dictionary fills by iteration as it runs."""
    saved: dict[int, Saved] = {}

    def save_state(state: RlhfState) -> None:
        tensors = {name: value.clone() for name, value in tensors_of(made).items()}
        saved[state.iteration] = Saved(json.dumps(state.to_dict()), save(dict(state.arrays())), tensors)

    made.learner = replace(made.learner, save=save_state, save_every=1)
    return saved


def run_from(made: Toy, start: Saved) -> RlhfState:
    """Runs a new toy from where another was saved; returns its last state."""
    for name, value in tensors_of(made).items():
        value.copy_(start.tensors[name])
    made.state = RlhfState.from_dict(json.loads(start.values), load(start.arrays))
    return made.run()


def assert_ends_alike(resumed: Toy, whole: Toy, saved: dict[int, Saved], start: int) -> None:
    """The tensors of a toy that went on after iteration `start`, and its metrics but those of time, are those of one
    that was not interrupted."""
    for name, value in tensors_of(resumed).items():
        assert torch.equal(value, saved[max(saved)].tensors[name]), name
    for again, report in zip(resumed.reports, whole.reports[start:], strict=True):
        untimed = {name: value for name, value in report.metrics.items() if not name.endswith("_per_s")}
        untimed = {name: value for name, value in untimed.items() if "timing" not in name}
        assert {name: again.metrics[name] for name in untimed} == untimed


# --- another algorithm: a completion against the mean of the others of its prompt (kool et al. 2019) ---


class GroupMean(Algorithm):
    """An `Algorithm` with neither critic nor clip nor keys."""

    def __init__(self) -> None:
        """Reads no configuration."""

    @property
    def uses_entropy(self) -> bool:
        return False

    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        same_BB = (experience.prompt_B[:, None] == experience.prompt_B[None]).float()
        others_B = same_BB.sum(1) - 1
        baseline_B = (same_BB @ experience.score_B - experience.score_B) / others_B
        advantage_BT = (experience.score_B - baseline_B)[:, None] * experience.mask_BT
        columns = {"advantage": advantage_BT, "old": experience.logprob_BT}
        return Prepared(columns, experience.mask_BT.sum(1), metrics={"others_mean": float(others_B.mean())})

    def policy_loss(self, tokens: DrawnTokens) -> LossSum:
        gain = (tokens.logprob_N * tokens.columns["advantage"]).sum()
        moved = (tokens.columns["old"] - tokens.logprob_N).detach().sum()
        return LossSum(-gain, torch.tensor(float(len(tokens.logprob_N))), {"approx_kl": moved})


# --- rollouts made by hand ---


def rollouts_with(
    prompt_tokens: list[int],
    new_tokens: list[int],
    *,
    finishes: list[str] | None = None,
    positions: list[int] | None = None,
    vocabulary: int = 64,
    version: int = 0,
    seed: int = 0,
) -> Rollouts:
    """Returns rollouts with random tokens of these lengths."""
    generator = np.random.default_rng(seed)
    n = len(prompt_tokens)
    return Rollouts(
        tokens_N=generator.integers(1, vocabulary, sum(prompt_tokens) + sum(new_tokens)),
        logprobs_M=-generator.random(sum(new_tokens), np.float32),
        prompt_tokens_B=np.array(prompt_tokens),
        new_tokens_B=np.array(new_tokens),
        finish_B=np.array([FINISHES.index(reason) for reason in finishes or ["eot"] * n]),  # type: ignore[arg-type]
        version_B=np.full(n, version),
        position_B=np.array(positions or range(n)),
        sample_B=np.zeros(n, np.int64),
    )


# --- text of the toy's vocabulary, to be learned beside the rollouts ---


def write_text(directory: Path) -> Path:
    """Writes a corpus of documents of 5 to 24 tokens; each document counts upwards."""
    made = []
    for i in range(60):
        tokens = [EOT, *(1 + (7 * i + k) % (VOCABULARY - 1) for k in range(4 + i % 20))]
        made.append(TokenizedDocument(np.array(tokens, np.uint16), len(tokens), "python", f"/text/{i}", "none", None))
    return write(directory, made)
