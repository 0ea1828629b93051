"""Puts together the controller of a run of stage `rlhf`: prompts, rules or environments, source of rollouts.

What it then does in an iteration is in `dist_lm/rlhf/controller.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from dist_lm.chat.template import stop_tokens
from dist_lm.cluster.pool import PoolRollouts
from dist_lm.cluster.sandboxes import sandboxes_of
from dist_lm.config.pool import PUSH_AUTO, PUSH_RAY
from dist_lm.config.root import TRUST_ME
from dist_lm.environments.protocol import Task
from dist_lm.evaluation.in_loop import LoopTasks
from dist_lm.generation.decoder import WeightStream
from dist_lm.generation.grammar import Grammars
from dist_lm.parallel.sharding import compute_dtype
from dist_lm.rlhf.constrained_rollouts import RolloutConstraints
from dist_lm.rlhf.controller import Controller, Records, RolloutSupply
from dist_lm.rlhf.rewards import Judge, Tasks
from dist_lm.rlhf.rollouts import EngineRollouts, RolloutSource, ShuffledPrompts, SignsOfLife
from dist_lm.sandbox.pool import Sandboxes
from dist_lm.stages.pool_start import PoolStarter
from dist_lm.stages.rlhf.config import PROCESS, RlhfRunConfig
from dist_lm.stages.rlhf.constraint import constraint_of_index, no_tools
from dist_lm.stages.rlhf.engine import local_engine, rollout_spec
from dist_lm.stages.rlhf.environment_tasks import read_tasks
from dist_lm.stages.rlhf.prompts import Prompts, check_columns, forms_of, read_all, request_reader, tasks_of
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dist_lm.cluster.pool_actor import EngineSpec
    from dist_lm.cluster.pool_push import Sender

FIRST_WEIGHTS = -1  # version of the weights that actors start with; no rollout uses it


@dataclass(frozen=True)
class PromptsOfRun:
    """What rollouts begin with."""

    train: Prompts | Sequence[Task]
    held_out: Prompts | Sequence[Task]
    # of the completions of `train`; None: no rlhf.constraint, or an environment, whose rollouts carry their sets
    constraints: RolloutConstraints | None


def read_prompts(config: RlhfRunConfig, run: RunDirectory, tokenizer: Tokenizer, judges: bool) -> PromptsOfRun:
    """Returns the prompts of a run, or the tasks of its environment, and the constraints of completions.

    Args:
        judges: whether this process judges completions, for which it needs rows and tests.

    Raises:
        ArtefactError, ConfigError: as `read_all` and `read_tasks`.
        UserError: as `rollout_constraints`.
        OSError: a file cannot be read.
    """
    if config.rlhf.environment:
        return PromptsOfRun(*read_tasks(config.rlhf), constraints=None)
    train, held_out = read_all(config, run, tokenizer, judges=judges)
    constraints = rollout_constraints(config, train, tokenizer) if config.rlhf.constraint else None
    return PromptsOfRun(train, held_out, constraints)


def rollout_constraints(config: RlhfRunConfig, prompts: Prompts, tokenizer: Tokenizer) -> RolloutConstraints:
    """Returns the constraints of completions, on every rank: engines draw under them, and ranks follow them again.

    The constraint of the first prompt is compiled, so that one that cannot be followed is refused before it is used.

    Raises:
        ArtefactError: calls are constrained, and no prompt has tools.
        UserError: a constraint cannot be followed (GrammarError, SchemaError), or as `constraint_of_index`.
    """
    if config.rlhf.constrains_calls and not any(prompts.tools):
        raise no_tools(config.rlhf)

    constraint_of = constraint_of_index(config.rlhf, prompts, tokenizer)
    order = ShuffledPrompts(prompts, config.seed)
    grammars, ends = Grammars(lambda: tokenizer), (tokenizer.eot_id, *stop_tokens(tokenizer))
    grammars.matcher(constraint_of(0), ends).allowed()
    return RolloutConstraints(
        grammars, lambda position: constraint_of(order.index(position)), ends, tokenizer.vocab_size
    )


def open_controller(
    config: RlhfRunConfig,
    run: RunDirectory,
    tokenizer: Tokenizer,
    device: torch.device,
    prompts: PromptsOfRun,
    weights: WeightStream,
    alive: Callable[[], None],
    stack: ExitStack,
    pool: PoolStarter | None,
    tasks: LoopTasks | None,
) -> Controller:
    """Returns a controller with prompts, rules and source of rollouts in this process.

    Args:
        device: of an engine in this process; its type is that of actors.
        weights: of any version of the policy; read to the end.
        alive: called regularly during generation.
        stack: closes rules, environments and source.
        pool: the cluster of the actors; None: an engine in this process.
        tasks: those of stage.eval_tasks, which the source answers; None: there are none.

    Raises:
        ClusterError: Ray has no free resources for an actor.
        ArtefactError: a prompt lacks the tests that a reward asks for.
        ConfigError: there is no file of prompts, or this machine has no parser or no sandbox that a reward needs.
        UserError: the tokenizer lacks the mark that ends a turn, a kept chat template cannot write a request, or as
            `PoolStarter.start`.
        PoolFailure: actors die while they start.
    """
    settings, train, held_out = config.rlhf, prompts.train, prompts.held_out
    generating = SignsOfLife(alive)
    to_controller = partial(
        Controller, config=settings, seed=config.seed, iterations=config.stage.steps, held_out_prompts=held_out
    )

    on_nodes = partial(sandboxes_of, pool.cluster if pool else None)
    trust_me = config.sandbox == TRUST_ME

    def answering(source: RolloutSource) -> Callable[[Sequence[str]], Records] | None:
        return partial(answer_tasks, source, tasks, partial(on_nodes, 0, trust_me)) if tasks else None

    if not isinstance(train, Prompts):
        # Imported here, because runs without an environment need none of it.
        from dist_lm.rlhf.waiting_times import WaitingTimes
        from dist_lm.stages.rlhf.environment import open_environment_supply

        source = stack.enter_context(rollout_source(config, tokenizer, weights, device, generating, pool))
        environments = open_environment_supply(config, run, tokenizer, train, source, stack, generating)
        # Conversations about held-out tasks are not recorded.
        compared = replace(environments, folder=None, waiting=WaitingTimes())
        return to_controller(environments, held_out=compared, answer_tasks=answering(source))

    # The tests of prompts, not the benchmarks of `tasks`. Programs of a reward of kind tests run on the cores of all
    # nodes of the pool's cluster.
    tests = Tasks(tasks_of(settings, tokenizer), trust_me, on_nodes, config.seed)
    order = ShuffledPrompts(train, config.seed)
    judge = Judge(
        settings.rewards,
        tokenizer.decode,
        settings.max_failed_fraction,
        generating,
        tests,
        request_reader(tokenizer),
        lambda position: train.row_of(order.index(position)),
    )
    stack.enter_context(judge)

    # The columns of files were compared with the functions before the run started.
    if train.rows and not settings.prompts_from:
        origin = f"stage.corpus={config.stage.corpus}"
        check_columns(forms_of(settings), [(origin, row.columns) for row in train.rows])

    source = stack.enter_context(rollout_source(config, tokenizer, weights, device, generating, pool))
    constraint_at = prompts.constraints.constraint_at if prompts.constraints else None
    supply = RolloutSupply(source, order, judge, stop_tokens(tokenizer), constraint_at)

    assert isinstance(held_out, Prompts)
    constraint_of_held_out = constraint_of_index(settings, held_out, tokenizer) if settings.constraint else None
    compared = replace(supply, judge=judge.for_prompts(held_out.row_of), constraint_at=constraint_of_held_out)
    return to_controller(supply, held_out=compared, answer_tasks=answering(source))


def answer_tasks(
    source: RolloutSource, tasks: LoopTasks, open_sandboxes: Callable[[], Sandboxes], names: Sequence[str]
) -> Records:
    """Returns the answers to the questions of these tasks with their verdicts, drawn by the weights of the source.

    Args:
        open_sandboxes: for the programs of tasks with code.

    Raises:
        UserError, PoolFailure: of the source, see `RolloutSource`.
        SandboxError: no node has a sandbox for the programs of a task.
    """
    questions = tasks.of(names)
    with open_sandboxes() if questions.executes else nullcontext() as sandboxes:
        for answer in source.results(questions.requests):
            questions.take(answer, sandboxes)
        return questions.records(lambda: None)


@contextmanager
def rollout_source(
    config: RlhfRunConfig,
    tokenizer: Tokenizer,
    weights: WeightStream,
    device: torch.device,
    alive: Callable[[], None],
    pool: PoolStarter | None,
) -> Iterator[RolloutSource]:
    """Yields the source of rollouts: actors, which end with the block, or a local engine.

    Args:
        weights: weights of any version of the policy; read to the end.
        alive: called regularly during generation.
        pool: the cluster of the actors; None: a local engine.

    Raises:
        ClusterError: Ray has no free resources for an actor.
        PoolFailure: actors die while they start.
        UserError: as `PoolStarter.start`.
        ConfigError: bf16 is asked for on a GPU without it.
    """

    def keep_going() -> bool:
        alive()
        return True

    spec = rollout_spec(config, tokenizer, compute_dtype(config.parallel, device), device)
    if pool is not None:
        with pool.start(spec, weights, FIRST_WEIGHTS, keep_going, _sender(config, spec, device)) as actors:
            yield PoolRollouts(actors, sleeps=config.in_turns)
        return
    yield EngineRollouts(local_engine(config, spec, tokenizer, weights, device), sleeps=config.in_turns)


def _sender(config: RlhfRunConfig, spec: "EngineSpec", device: torch.device) -> "Sender | None":
    """Returns the sender that hands weights to the actors directly; None: Ray's object store carries them.

    Ray's store carries them with rlhf.pool.push=ray, with auto on a CPU, in asynchronous sampling, and if the
    controller is a process of its own.

    Args:
        device: where this process holds the weights.
    """
    push = config.pool.push
    # A sender waits for idle actors, which asynchronous sampling never has, and reads the memory of a rank's GPU, which
    # a controller in a process of its own does not have.
    goes_through_ray = config.rlhf.asynchronous or config.rlhf.controller == PROCESS
    if push == PUSH_RAY or (push == PUSH_AUTO and device.type == "cpu") or goes_through_ray:
        return None
    from dist_lm.cluster.pool_push import sender_for

    patience_s = config.cluster.hang_min_s / 4  # must end before the silence of this rank counts as a hang
    return sender_for(push, spec.model, spec.dtype, device, tp=spec.tp, patience_s=patience_s)
