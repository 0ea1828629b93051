"""Replays recorded conversations of a run of stage `rlhf`: draws them again from its weights, or executes them again.

Nothing is written, so a run may go on meanwhile.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from dist_lm.config.root import TRUST_ME
from dist_lm.environments.host import Host
from dist_lm.errors import ArtefactError, require
from dist_lm.generation.engine import Engine
from dist_lm.parallel.mesh import choose_device
from dist_lm.parallel.sharding import compute_dtype
from dist_lm.rlhf.conversation_loop import ConversationLoop
from dist_lm.rlhf.environment_rollouts import conversing, hold_together
from dist_lm.rlhf.episodes import Episode
from dist_lm.rlhf.replay import OF_ROUNDING, Difference, Outcome, drawn_again, executed_again
from dist_lm.rlhf.request_feed import Ask
from dist_lm.rlhf.rollouts import EngineRollouts
from dist_lm.stages.rlhf.engine import local_engine, rollout_spec
from dist_lm.stages.rlhf.environment import turn_constraint
from dist_lm.stages.rlhf.record import ConversationRecord, RecordedIteration
from dist_lm.storage import process
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files
from dist_lm.training.checkpoint_tensors import model_weights

WEIGHTS_IN_MEMORY = 2  # versions of an asynchronous run


@dataclass(frozen=True)
class MetricDifference:
    """A metric that is not the one that the run wrote."""

    name: str
    written: float | None
    computed: float


@dataclass(frozen=True)
class IterationReplay:
    """The result for one iteration."""

    iteration: int  # from 1, as in metrics
    version: int  # the weights that drew them: the policy after that many iterations
    conversations: int  # compared
    turns: int
    tokens: int  # drawn by the model
    # the checkpoint that drew them again, the newest of several; None: they were not drawn, for want of `version`
    weights: str | None
    differing: int  # conversations
    rollout: int | None = None  # the first that differs, from 1: by task, then by sample
    difference: Difference | None = None
    largest_gap: float | None = None  # nats; between log-probabilities of equal tokens
    threads: int | None = None  # of the engine, where bits are compared
    not_compared: int = 0  # conversations whose end was a failure that need not happen again
    metrics: int = 0  # equal to those written
    metric_difference: MetricDifference | None = None
    is_finished: bool = True  # False: the run was still drawing conversations

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return self.difference is None and self.metric_difference is None


@dataclass(frozen=True)
class Chosen:
    """What is replayed; None: all."""

    iteration: int | None = None  # from 1
    rollout: int | None = None  # of the iteration, from 1

    def __post_init__(self) -> None:
        has_iteration = self.rollout is None or self.iteration is not None
        require(has_iteration, "--rollout", self.rollout, "--iteration beside it")

    def rollouts_of(self, iteration: RecordedIteration) -> Sequence[tuple[int, Episode]]:
        """Returns (number, conversation) of those of an iteration that are replayed.

        Raises:
            ConfigError: there is no such conversation.
        """
        numbered = [*enumerate(iteration.episodes, 1)]
        if self.rollout is None:
            return numbered
        require(1 <= self.rollout <= len(numbered), "--rollout", self.rollout, f"1 to {len(numbered)}")
        return [numbered[self.rollout - 1]]


def no_weights(record: ConversationRecord, version: int) -> str:
    """Returns the sentence that says that weights are not kept, and what keeps them.

    Args:
        version: finished iterations of the weights.
    """
    init_from = record.config.stage.init_from
    if version == 0 and init_from == "none":
        return "no checkpoint holds the random weights that the run began with (stage.init_from=none)"
    if version == 0:
        return f"the weights that the run began with are gone: restore stage.init_from={init_from}"
    return (
        f"the weights after iteration {version} are in no checkpoint: start runs with stage.checkpoint_every=1 "
        f"stage.keep_checkpoints={record.config.stage.steps}, which keep all"
    )


# --- drawn again ---


def draw_again(record: ConversationRecord, chosen: Chosen) -> Iterator[IterationReplay]:
    """Yields, for each recorded iteration, how it compares with conversations that its weights draw again.

    Where the checkpoint with these weights is not kept, only metrics are compared; of a single rollout, which has
    none, that is an ArtefactError.

    Raises:
        ArtefactError, ConfigError: a file is missing, damaged or of something else, or what is chosen is not there.
        UserError: the constraint of turns needs a package that is not installed.
        RequestError: the engine refuses a request.
    """
    with own_threads(), ConversationLoop(nullcontext) as conversations:
        drawing = Drawing(record, conversations)
        for iteration in record.iterations(chosen.iteration):
            rollouts = chosen.rollouts_of(iteration)
            weights = {version: record.weights_of(version) for version in sorted(iteration.versions)}
            checkpoints = {version: path for version, path in weights.items() if path is not None}
            missing = min(weights.keys() - checkpoints.keys(), default=None)
            if missing is not None and chosen.rollout is not None:
                raise ArtefactError(f"iteration {iteration.number}: {no_weights(record, missing)}")

            result = _result(iteration, rollouts, [])
            if missing is not None:
                result = replace(result, version=missing)
            else:
                outcomes = drawing.outcomes(checkpoints, [episode for _, episode in rollouts])
                gap = max((outcome.largest_gap for outcome in outcomes), default=0.0)
                result = _result(iteration, rollouts, outcomes)
                newest = str(checkpoints[max(checkpoints)])
                result = replace(result, weights=newest, largest_gap=gap, threads=drawing.threads)
            if chosen.rollout is None and iteration.scored is not None:
                result = _with_metrics(result, record, iteration)
            yield result


class Drawing:
    """Draws recorded conversations again, with one engine whose weights change."""

    def __init__(self, record: ConversationRecord, conversations: ConversationLoop[Any]) -> None:
        """
        Raises:
            ArtefactError: the tokenizer is missing or damaged.
            ConfigError: there is no GPU, though the run asks for one.
        """
        run, config = record.run, record.config
        self._record, self._conversations = record, conversations

        self._tokenizer = Tokenizer.load(run.work.tokenizer_model)
        self._device = choose_device(config.device, 0)
        self._dtype = compute_dtype(config.parallel, self._device)
        # Elsewhere, sums are added in another order each time.
        self.is_exact = self._device.type == "cpu" and self._dtype == torch.float32

        self.how = conversing(
            config.rlhf,
            config.seed,
            self._tokenizer,
            config.rlhf.environment_limits.limits,
            config.model.max_seq_len,
            *(part.weight for part in config.rlhf.rewards.values()),
            constraint_of=turn_constraint(config.rlhf, self._tokenizer),
        )

        self._source: _FollowingRollouts | None = None
        # Weights that change in a conversation alternate.
        most = WEIGHTS_IN_MEMORY if config.rlhf.asynchronous else 1
        self._weights = lru_cache(maxsize=most)(partial(_verified_weights, self._tokenizer.sha256))

    @property
    def threads(self) -> int | None:
        """The number of threads with which bits were compared; None where they are not."""
        return torch.get_num_threads() if self.is_exact else None

    def outcomes(self, checkpoints: Mapping[int, Path], episodes: Sequence[Episode]) -> list[Outcome]:
        """Returns how conversations compare with those that the weights of checkpoints draw, in their order.

        Args:
            checkpoints: of each version that drew a token; several only if turns note their versions.

        Raises:
            ArtefactError: a checkpoint is damaged, or belongs to another model or tokenizer; or a record is damaged.
            UserError, RequestError: as `draw_again`.
        """
        outcomes = self._drawn(checkpoints, episodes)
        if not self.is_exact:
            return outcomes

        # On a CPU the last bits depend on the number of threads, which differs between ranks, actors and this process.
        recorded_with = torch.get_num_threads()
        for threads in _shares_of_cores(besides=recorded_with):
            rounded = [
                index
                for index, outcome in enumerate(outcomes)
                if outcome.difference and outcome.difference.what in OF_ROUNDING
            ]
            if not rounded:
                break

            torch.set_num_threads(threads)
            again = self._drawn(checkpoints, [episodes[index] for index in rounded])
            for index, outcome in zip(rounded, again, strict=True):
                if outcome.difference is None:
                    recorded_with = threads
                if outcome.difference is None or outcome.n_equal > outcomes[index].n_equal:
                    outcomes[index] = outcome

        # The next iteration was probably drawn with as many.
        torch.set_num_threads(recorded_with)
        return outcomes

    def _drawn(self, checkpoints: Mapping[int, Path], episodes: Sequence[Episode]) -> list[Outcome]:
        """Returns the outcomes of the episodes, in their order, drawn with the present number of threads.

        Args:
            checkpoints: checkpoint of each version of the weights that the episodes need.

        Raises:
            ArtefactError: a record does not hold what a replay needs.
            RequestError, UserError, PoolFailure: as `hold_together`.
        """
        oldest = min(checkpoints)
        source = self._loaded(checkpoints[oldest], oldest)
        source.checkpoints = checkpoints
        outcomes: dict[int, Outcome] = {}

        async def hold(index: int, ask: Ask) -> None:
            episode = episodes[index]
            (task,) = self._record.tasks(episode.position, 1)
            outcomes[index] = await drawn_again(self.how, episode, task, ask, self.is_exact)

        holding = [partial(hold, index) for index in range(len(episodes))]
        hold_together(source, self._conversations, holding, self._record.config.rlhf.environments_at_once)
        return [outcomes[index] for index in range(len(episodes))]

    def source(self, checkpoint: Path, version: int) -> EngineRollouts:
        """Returns the engine with the weights of a checkpoint, for the present number of threads.

        Raises:
            ArtefactError: as `outcomes`.
        """
        return self._loaded(checkpoint, version)

    def _loaded(self, checkpoint: Path, version: int) -> "_FollowingRollouts":
        config, weights = self._record.config, self._weights(checkpoint)
        if self._source is None:
            spec = rollout_spec(config, self._tokenizer, self._dtype, self._device)
            engine = local_engine(config, spec, self._tokenizer, weights, self._device)
            self._source = _FollowingRollouts(engine, self._weights)
        # Loading lays matrices out for the present number of threads.
        self._source.load_weights(weights, version)
        return self._source


def _verified_weights(tokenizer_sha256: str, checkpoint: Path) -> Mapping[str, torch.Tensor]:
    """Returns the weights of a checkpoint after verifying all of its files.

    Raises:
        ArtefactError: it is damaged, or belongs to another tokenizer.
    """
    checkpoint_files.require_intact(checkpoint)
    state = checkpoint_files.read_state(checkpoint)[0]
    checkpoint_files.check_tokenizer(checkpoint, state, tokenizer_sha256)
    return {name: torch.from_numpy(array) for name, array in model_weights(checkpoint).items()}


class _FollowingRollouts(EngineRollouts):
    """Gives requests the versions of the weights that they wait for, the oldest first."""

    def __init__(self, engine: Engine, weights_of: Callable[[Path], Mapping[str, torch.Tensor]]) -> None:
        super().__init__(engine)
        self._weights_of = weights_of
        self.checkpoints: Mapping[int, Path] = {}  # by version

    def _renew(self) -> None:
        version = self.engine.awaited_version()
        if version is not None:
            self.engine.swap_weights(self._weights_of(self.checkpoints[version]), version)


@contextmanager
def own_threads() -> Iterator[None]:
    """Gives torch the number of threads back that it has now."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _shares_of_cores(besides: int) -> list[int]:
    """Returns the numbers of threads that a rank or an actor may have on this machine: equal shares of its cores."""
    n_cores = process.cores()
    return sorted({n_cores // n_processes for n_processes in range(1, n_cores + 1)} - {besides})


# --- executed again ---


def execute_again(record: ConversationRecord, chosen: Chosen) -> Iterator[IterationReplay]:
    """Yields, for each recorded iteration, how its observations and verdicts compare with those that a fresh
    environment gives for the recorded turns.

    Raises:
        ArtefactError, ConfigError: a file is missing, damaged or of something else, or what is chosen is not there.
        UserError: the environment cannot be opened: a class cannot be imported, or there is no sandbox (SandboxError).
        Exception: what a conversation raises first; the others are cancelled.
    """
    group = record.config.rlhf
    with ConversationLoop(fresh_environment(record)) as conversations:
        for iteration in record.iterations(chosen.iteration):
            rollouts = chosen.rollouts_of(iteration)
            outcomes: dict[int, Outcome] = {}

            async def execute(number: int, episode: Episode, outcomes: dict[int, Outcome] = outcomes) -> None:
                (task,) = record.tasks(episode.position, 1)
                outcomes[number] = await executed_again(conversations.host, episode, task)

            conversations.run_all([partial(execute, *rollout) for rollout in rollouts], group.environments_at_once)
            yield _result(iteration, rollouts, [outcomes[number] for number, _ in rollouts])


def fresh_environment(record: ConversationRecord) -> Callable[[], Host]:
    """Returns what opens the environment of a run.

    Raises:
        ArtefactError: the file of its class has changed.
    """
    record.require_environment()
    group = record.config.rlhf
    trust_me = record.config.sandbox == TRUST_ME
    return partial(Host, group.environment, group.environment_limits.limits, trust_me=trust_me)


# --- results ---


def _result(
    iteration: RecordedIteration, rollouts: Sequence[tuple[int, Episode]], outcomes: Sequence[Outcome]
) -> IterationReplay:
    """Returns the result for an iteration, of which no conversations were replayed if there are no outcomes."""
    episodes = [episode for _, episode in rollouts]
    numbers = [number for number, _ in rollouts]
    # Not strict: there are no outcomes if nothing was replayed.
    differing = [pair for pair in zip(numbers, outcomes, strict=False) if pair[1].difference is not None]
    rollout, first = differing[0] if differing else (None, None)

    return IterationReplay(
        iteration=iteration.number,
        version=iteration.version,
        conversations=len(episodes),
        turns=sum(len(episode.turns) for episode in episodes),
        tokens=sum(turn.new_tokens for episode in episodes for turn in episode.turns),
        weights=None,
        differing=len(differing),
        rollout=rollout,
        difference=first.difference if first else None,
        not_compared=sum(not outcome.is_complete for outcome in outcomes),
        is_finished=iteration.scored is not None,
    )


def _with_metrics(result: IterationReplay, record: ConversationRecord, iteration: RecordedIteration) -> IterationReplay:
    """Returns the result with the comparison of metrics."""
    metrics = record.metrics_of(iteration)
    for name, (computed, written) in sorted(metrics.items()):
        if not record.is_equal(computed, written):
            return replace(result, metric_difference=MetricDifference(name, written, computed))
    return replace(result, metrics=len(metrics))
