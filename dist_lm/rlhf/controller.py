"""The controller of RLHF: prompts, environments, rewards and the order of drawing, apart from the ranks.

    learner      begin(state, weights) | take 0      | update | push(1, weights) | take 1      | update | ...
    controller                         | draw, judge |        |                  | draw, judge |        | ...

This is rlhf.max_staleness=0, the default. With staleness, rollouts are drawn in a thread, beside the updates
(`schedule.py`). A controller holds a schedule (when to draw), a supply (prompts and rules) and in it a source (an
engine, or a pool of actors with one each).

It lives on the first rank, or in its child, and knows no process group: given a state and the weights of its version,
it returns the rollouts of an iteration with their scores as a few arrays. `on_every_rank` hands them to all ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

from dist_lm.generation.decoder import WeightStream
from dist_lm.generation.request import SamplingParams
from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import broadcast
from dist_lm.parallel.node_memory import HAS_SHARED_MEMORY, NodeMemory, share_memory
from dist_lm.rlhf.config import RlhfConfig
from dist_lm.rlhf.rewards import Judge
from dist_lm.rlhf.rollouts import (
    ConstraintOrder,
    PromptOrder,
    Rollouts,
    RolloutSource,
    ScoredRollouts,
    requests_of,
    rollouts_of,
)
from dist_lm.rlhf.schedule import Drawn, RolloutSchedule, SamplingAgain, Schedule

Records = dict[str, list[dict[str, Any]]]
"""Answers to the questions of tasks with their verdicts, by task; plain JSON."""


@dataclass(frozen=True)
class ControllerState:
    """All that a controller needs to go on where another one was, beside the weights of the version."""

    version: int  # of the weights
    position: int  # position of the next prompt in the order of prompts
    pending: Mapping[int, ScoredRollouts]  # rollouts drawn ahead by older weights, by iteration
    taken: int = 0  # iterations, beginning with number `version`, whose rollouts the ranks have taken already


class RolloutController(Protocol):
    """A `Controller` in the first rank, or one in a process of its own (`controller_process.ControllerProcess`)."""

    def begin(self, state: ControllerState, weights: WeightStream) -> None: ...

    def push(self, version: int, weights: WeightStream) -> None: ...

    def take(self, iteration: int) -> Drawn | NodeMemory: ...

    def ahead(self, version: int) -> dict[int, ScoredRollouts]: ...

    def end(self) -> None: ...

    def times(self) -> dict[str, float]: ...

    def answers(self, version: int, weights: WeightStream, seed: int) -> ScoredRollouts: ...

    def evaluate(self, tasks: Sequence[str], version: int, weights: WeightStream | None) -> Callable[[], Records]: ...


def on_every_rank(taken: Drawn | NodeMemory | None, world: World) -> Drawn:
    """Returns the first rank's rollouts on every rank, in host memory that the ranks of a node share (collective).

    Where ranks cannot share memory, each gets a copy.

    Args:
        taken: rollouts, or memory that holds them already; read on the first rank alone.

    Raises:
        OSError: a node has no memory left; on its first rank alone, while the others wait for it.
        MessageError: another rank has sent something else.
    """
    drawn = taken.read(Drawn) if isinstance(taken, NodeMemory) else taken
    if world.size == 1:
        assert drawn is not None
        return drawn

    memory = None
    if HAS_SHARED_MEMORY:
        own_memory = NodeMemory.of(taken) if isinstance(taken, Drawn) else taken
        memory = share_memory(own_memory, world.local_rank)
    if memory is None:
        return broadcast(cast(Drawn, drawn), Drawn)

    with closing(memory):
        return memory.read(Drawn)


# --- what it draws from ---


@dataclass(frozen=True)
class RolloutSupply:
    """The part of the loop that only the controller has: prompts, the source of completions, and the rules."""

    source: RolloutSource
    prompts: PromptOrder
    judge: Judge
    stop_tokens: tuple[int, ...] = ()  # tokens that end a completion, besides end-of-text; not with rlhf.ignore_eot
    constraint_at: ConstraintOrder | None = None  # what completions must be; None: anything

    def draw(
        self, prompts: Sequence[Sequence[int]], position: int, samples: int, config: RlhfConfig, seed: int
    ) -> Rollouts:
        """Returns `samples` completions of each prompt, drawn by the weights that the source has.

        Rules that run programs start on each answer as soon as it is there, while the engines draw the others.

        Args:
            position: position of the first prompt in the order of prompts.
            seed: of the run; with the prompt's position it determines each answer.

        Raises:
            RequestError: a prompt cannot be answered, or its constraint not be followed.
            RewardError: a prompt has no tests, though a part of the reward needs them.
            UserError, PoolFailure: of the source, see `RolloutSource`.
        """
        params = SamplingParams(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop_tokens=() if config.ignore_eot else self.stop_tokens,
            ignore_eot=config.ignore_eot,
        )
        requests = requests_of(prompts, position, samples, params, seed, self.constraint_at)
        return rollouts_of(requests, self.source.generate(requests, self.judge.begin))

    def times(self) -> dict[str, float]:
        """Returns nothing: completions of one turn wait for the engines alone, whose time is measured as a whole."""
        return {}


class Supply(Protocol):
    """A `RolloutSupply`, or one of conversations (`environment_rollouts.EnvironmentSupply`)."""

    @property
    def source(self) -> RolloutSource: ...

    @property
    def prompts(self) -> Callable[[int, int], Sequence[Any]]: ...

    @property
    def judge(self) -> Callable[..., ScoredRollouts]: ...

    def draw(
        self, prompts: Sequence[Any], /, position: int, samples: int, config: RlhfConfig, seed: int
    ) -> Rollouts: ...

    def times(self) -> dict[str, float]: ...


# --- the controller ---


@dataclass
class Controller:
    """Gives the first rank the rollouts of each iteration. Methods are called one after the other. A run's controller
    is put together in `dist_lm/stages/rlhf/controller.py`.

    They raise RequestError, RewardError, ArtefactError, UserError and PoolFailure as the methods of `Schedule` do.
    """

    supply: Supply
    config: RlhfConfig
    seed: int  # of the run
    iterations: int  # length of the whole run
    held_out: Supply | None = None  # for `answers`; None: `supply`
    held_out_prompts: Sequence[Any] = ()
    answer_tasks: Callable[[Sequence[str]], Records] | None = None  # with the weights of the source, for `evaluate`
    _schedule: Schedule | None = field(init=False, default=None)  # between `begin` and `end`
    _stack: ExitStack = field(init=False, default_factory=ExitStack)

    @property
    def _begun(self) -> Schedule:
        assert self._schedule is not None, "a controller that has not begun"
        return self._schedule

    def begin(self, state: ControllerState, weights: WeightStream) -> None:
        """Starts, or resumes, with the weights of the state's version, which are read to the end.

        Rollouts of the state that are pending are taken over and not drawn again.
        """
        self._schedule = self._stack.enter_context(self._new_schedule())
        self._schedule.begin(state.version, weights, state.pending, state.position, state.taken)

    def push(self, version: int, weights: WeightStream) -> None:
        """Reads new weights to the end; they draw later rollouts.

        Args:
            version: finished iterations.
        """
        self._begun.push(version, weights)

    def take(self, iteration: int) -> Drawn:
        """Waits for the rollouts of an iteration, or draws them, and returns them with their scores.

        Args:
            iteration: from 0; each can be taken once.
        """
        return self._begun.take(iteration)

    def ahead(self, version: int) -> dict[int, ScoredRollouts]:
        """Returns the rollouts drawn ahead that a checkpoint at `version` keeps, by iteration."""
        return self._begun.ahead(version)

    def end(self) -> None:
        """Ends what `begin` has started; answers can still be drawn."""
        self._schedule = None
        self._stack.close()

    def times(self) -> dict[str, float]:
        """Returns the mean waiting times of a conversation since the last call, in seconds, by metric; perhaps none."""
        return self.supply.times()

    def answers(self, version: int, weights: WeightStream, seed: int) -> ScoredRollouts:
        """Returns an answer to each held-out prompt, with its scores. They are drawn by other weights, which are read
        to the end and stay in the source.

        Args:
            version: of these weights in the source; not one of an iteration.
            seed: in place of the run's.
        """
        supply = self.held_out or self.supply
        supply.source.load_weights(weights, version)
        rollouts = supply.draw(self.held_out_prompts, 0, 1, self.config, seed)
        return supply.judge(rollouts, expected=self.config.rollouts_per_iteration)

    def evaluate(self, tasks: Sequence[str], version: int, weights: WeightStream | None) -> Callable[[], Records]:
        """Queues the questions of tasks for the engines, see `RolloutSchedule.queue`; returns what waits for answers.

        Args:
            weights: those of `version`, if they were not pushed.
        """
        assert isinstance(self._schedule, RolloutSchedule), "tasks beside asynchronous sampling"
        assert self.answer_tasks is not None
        return self._schedule.queue(partial(self.answer_tasks, tasks), version, weights)

    def _new_schedule(self) -> Schedule:
        """Returns what draws the rollouts of this run."""
        supply, config = self.supply, self.config
        if config.asynchronous:
            from dist_lm.rlhf.asynchronous import AsynchronousSchedule
            from dist_lm.rlhf.environment_rollouts import EnvironmentSupply

            assert isinstance(supply, EnvironmentSupply), "rlhf.asynchronous without an environment"
            return AsynchronousSchedule(supply, config, self.seed, self.iterations)

        def draw(position: int, prompts: int) -> Rollouts:
            return supply.draw(
                supply.prompts(position, prompts), position, config.rollouts_per_prompt, config, self.seed
            )

        # Groups without a signal are replaced by the next prompts, so scores decide what is drawn next.
        draw_scored = None
        if config.sampling_rounds:
            judge = partial(supply.judge, expected=config.rollouts_per_iteration)
            draw_scored = SamplingAgain(draw, judge, config.rewards, config.prompts, config.sampling_rounds)
        return RolloutSchedule(
            supply.source,
            partial(draw, prompts=config.prompts),
            supply.judge,
            staleness=config.max_staleness,
            iterations=self.iterations,
            prompts=config.prompts,
            draw_scored=draw_scored,
        )
