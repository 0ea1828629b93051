"""The supply of conversations with the environment of stage `rlhf`, on the first rank."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from dist_lm.config.root import TRUST_ME
from dist_lm.environments.host import Host
from dist_lm.environments.protocol import Task
from dist_lm.rlhf.conversation_loop import ConversationLoop
from dist_lm.rlhf.conversing import ConstraintOf
from dist_lm.rlhf.environment_rollouts import EnvironmentJudge, EnvironmentSupply, VersionedSource
from dist_lm.rlhf.rollouts import RolloutSource, ShuffledPrompts, SignsOfLife
from dist_lm.stages.rlhf.config import RlhfRunConfig, RlhfRunGroup
from dist_lm.stages.rlhf.constraint import constraint_of_tools, read_constraint
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer


def open_environment_supply(
    config: RlhfRunConfig,
    run: RunDirectory,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    source: RolloutSource,
    stack: ExitStack,
    alive: SignsOfLife,
) -> EnvironmentSupply:
    """Returns the supply of conversations, on the first rank.

    Args:
        stack: closes the environments.
        alive: called regularly while conversations are held.

    Raises:
        UserError: the environment cannot be opened: a class cannot be imported, or there is no sandbox (SandboxError).
    """
    settings = config.rlhf
    limits = settings.environment_limits.limits
    # The environment gives the only part of the reward: `RlhfRunGroup` refuses others beside it.
    ((part, weight),) = [(name, part.weight) for name, part in settings.rewards.items()]
    open_host = partial(Host, settings.environment, limits, trust_me=config.sandbox == TRUST_ME)
    conversations = stack.enter_context(ConversationLoop(open_host))

    return EnvironmentSupply(
        VersionedSource(source),
        ShuffledPrompts(tasks, config.seed),
        EnvironmentJudge(settings.environment, part, settings.max_failed_fraction),
        tokenizer,
        conversations,
        limits,
        config.model.max_seq_len,
        settings.environments_at_once,
        weight,
        turn_constraint(settings, tokenizer),
        run.conversations,
        alive,
        take_held_again=conversations.host.take_held_again,
    )


def turn_constraint(settings: RlhfRunGroup, tokenizer: Tokenizer) -> ConstraintOf | None:
    """Returns what every turn must be, by the tools of its task; None without rlhf.constraint.

    Raises:
        ConfigError: the file of rlhf.constraint cannot be read, or holds no constraint.
        UserError: as `constraint_of_tools`.
    """
    if not settings.constraint:
        return None
    if path := settings.constraint_file:
        constraint = read_constraint(path, settings.constraint)
        return lambda tools: constraint
    return constraint_of_tools(settings, tokenizer)
