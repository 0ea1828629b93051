"""The conversations of an RLHF run with an environment that a report shows: which ones, and how they compare.

    iterations       the first, the middle and the last one; of several runs fewer, the last one first
    conversations    the best, the worst, the first that a limit cut, the first one of each of the two most frequent
                     reasons for no verdict: at most CHOSEN of an iteration

Dimensions: B conversations of a task, T tokens of the longest.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lm.errors import ArtefactError, ConfigError, UserError, one_line
from dist_lm.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from dist_lm.rlhf.episodes import Episode
    from dist_lm.stages.rlhf.config import RlhfRunConfig
    from dist_lm.tokenizer.tokenizer import Tokenizer

ITERATIONS = 3  # shown of a run
MOST_REASONS = 2  # why conversations have no verdict, of an iteration
CHOSEN = 3 + MOST_REASONS  # most conversations of an iteration
MOST = 30  # conversations of all runs of a report


@dataclass(frozen=True)
class ChosenConversation:
    """A recorded conversation that the page shows."""

    why: str  # "best", "worst", "cut", "no verdict"
    # among those of its iteration, from 1, by task, then by sample: `dist-lm replay --rollout`; None: not known
    number: int | None
    episode: "Episode"
    group: int  # conversations of its task that have a verdict
    group_reward: float | None  # their mean reward
    advantage: float | None  # None: without a verdict, or the algorithm compares no group
    penalty: float = 0.0  # its reward is smaller by this, because it was cut
    thinking: tuple[str, ...] = ()  # thoughts by turn of the model; empty: not known


@dataclass(frozen=True)
class IterationConversations:
    """The conversations of one file of a run: those of an iteration, or of one draw of it (`rlhf.sampling_rounds`)."""

    file: str
    number: int | None  # number of the iteration, from 1; None: not known
    total: int = 0  # conversations
    cut: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)  # conversations without a verdict, by reason
    reward: float | None = None  # mean over those with a verdict
    chosen: tuple[ChosenConversation, ...] = ()
    problem: str = ""  # why it has none


@dataclass(frozen=True)
class _Judged:
    """What is needed of every conversation of an iteration."""

    reward: float | None
    cut: str
    new_tokens: int


def iterations_for(num_runs: int) -> int:
    """Returns of how many iterations each run of a report shows conversations."""
    return min(ITERATIONS, MOST // CHOSEN // num_runs) if num_runs else 0


def read_conversations(run: RunDirectory, most: int, is_finished: bool) -> tuple[IterationConversations, ...]:
    """Returns what is shown of the conversations of some iterations, in their order; empty without any.

    Reads one file for each iteration, once: about 20 bytes for each token of its conversations.

    Args:
        most: iterations.
        is_finished: whether the run is; else its last file, which may still grow, counts only if it is the only one.

    Raises:
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    if not run.conversations.is_dir():
        return ()
    # imports torch, which a report of other stages does without
    from dist_lm.rlhf.environment_rollouts import file_name, recorded_positions

    positions = recorded_positions(run.conversations)
    if not is_finished and len(positions) > 1:
        positions.pop()
    if not positions:
        return ()

    # The last iteration says most about the model, if there are fewer than three.
    by_importance = dict.fromkeys([positions[-1], positions[0], positions[len(positions) // 2]])

    config, problem = None, ""
    try:
        config = _config(run)
    except (ArtefactError, ConfigError) as error:
        problem = f"advantages are not known: {one_line(str(error))}"

    tokenizer = None
    try:
        tokenizer = _tokenizer(run)
    except UserError as error:
        problem = f"{problem}; " * bool(problem) + f"thinking is not shown: {one_line(str(error))}"

    iterations = []
    for position in sorted([*by_importance][:most]):
        path = run.conversations / file_name(position)
        try:
            iteration = _read(path, position, config, problem)
            chosen = tuple(replace(c, thinking=thinking_of(c.episode, tokenizer)) for c in iteration.chosen)
            iterations.append(replace(iteration, chosen=chosen))
        # One damaged file must not hide what the others show.
        except (ArtefactError, OSError) as error:
            iterations.append(IterationConversations(path.name, None, problem=one_line(str(error))))
    return tuple(iterations)


def _config(run: RunDirectory) -> "RlhfRunConfig":
    """Raises ArtefactError or ConfigError: this version does not read the configuration."""
    from dist_lm.stages.registry import load_config
    from dist_lm.stages.rlhf.config import RlhfRunConfig

    config = load_config(run.config)
    if not isinstance(config, RlhfRunConfig):
        raise ArtefactError(f"{run.config}: stage {config.stage.name} draws no conversations")
    return config


def _tokenizer(run: RunDirectory) -> "Tokenizer | None":
    """Returns the tokenizer of a run; None without a checkpoint, which alone says which one that is.

    Raises:
        UserError: the newest checkpoint or the tokenizer cannot be read, or they do not belong together.
    """
    from dist_lm.tokenizer.tokenizer import Tokenizer
    from dist_lm.training import checkpoint_files

    checkpoints = checkpoint_files.steps_in(run.checkpoints)
    if not checkpoints:
        return None
    state = checkpoint_files.read_state(checkpoints[-1])[0]
    tokenizer = Tokenizer.load(run.work.tokenizer_model)
    checkpoint_files.check_tokenizer(checkpoints[-1], state, tokenizer.sha256)
    return tokenizer


def thinking_of(episode: "Episode", tokenizer: "Tokenizer | None") -> tuple[str, ...]:
    """Returns what the model thought in each of its turns, which actions do not hold; empty where ids are not recorded,
    or the tokenizer is not known.

    Raises:
        ArtefactError: the ids do not belong to the turns.
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    from dist_lm.rlhf.replay import RecordedTurns
    from dist_lm.rlhf.transcript import read_turn

    if tokenizer is None or not episode.samples:
        return ()
    recorded = RecordedTurns(episode)
    drawn = [recorded.next(turn, number).tokens for number, turn in enumerate(episode.turns, 1) if turn.new_tokens]
    return tuple(read_turn(tokens, tokenizer).message.thinking for tokens in drawn)


def _read(path: Path, position: int, config: "RlhfRunConfig | None", problem: str) -> IterationConversations:
    """Returns what is shown of the conversations of a file.

    Raises:
        ArtefactError: it is damaged.
        OSError: it cannot be read.
    """
    from dist_lm.rlhf.episodes import recorded_lines

    judged: dict[tuple[int, int], _Judged] = {}
    failures: Counter[str] = Counter()
    leading: dict[str, tuple[tuple[float, ...], Episode]] = {}  # why, or reason -> the first in an order, and that

    def consider(why: str, order: tuple[float, ...], episode: "Episode") -> None:
        if why not in leading or order < leading[why][0]:
            leading[why] = order, episode

    # Conversations are written as they end: only the order of tasks and samples gives each report the same choice.
    for line in recorded_lines(path):
        episode, reward = line.episode, line.episode.reward
        key = episode.position, episode.sample
        judged[key] = _Judged(reward, episode.cut, sum(turn.new_tokens for turn in episode.turns))
        if reward is None:
            reason = str(episode.verdict.failure_reason)
            failures[reason] += 1
            consider(reason, key, episode)
            continue

        # A cut may cost a penalty, so of equal rewards that of a conversation that ended is the better one.
        is_cut = bool(episode.cut)
        consider("best", (-reward, is_cut, *key), episode)
        consider("worst", (reward, not is_cut, *key), episode)
        if is_cut:
            consider("cut", key, episode)

    # A conversation is shown once, under the first name that it has.
    chosen_episodes: dict[tuple[int, int], tuple[str, Episode]] = {}
    frequent = sorted(failures, key=lambda reason: (-failures[reason], reason))[:MOST_REASONS]
    for why in [why for why in ("best", "worst", "cut", *frequent) if why in leading]:
        episode = leading[why][1]
        name = why if episode.verdict.valid else "no verdict"
        chosen_episodes.setdefault((episode.position, episode.sample), (name, episode))

    # With several draws in an iteration, a file does not tell how many conversations stand before it; with
    # rlhf.asynchronous it does not even tell the iteration.
    is_whole = config is not None and not (config.rlhf.sampling_rounds or config.rlhf.asynchronous)
    numbers = {key: number if is_whole else None for number, key in enumerate(sorted(judged), 1)}
    chosen = tuple(
        _in_its_group(why, numbers[key], episode, judged, config) for key, (why, episode) in chosen_episodes.items()
    )
    rewards = [conversation.reward for conversation in judged.values() if conversation.reward is not None]
    version = min((conversation.episode.version for conversation in chosen), default=0)
    return IterationConversations(
        file=path.name,
        number=_iteration_at(position, version, config),
        total=len(judged),
        cut=sum(bool(conversation.cut) for conversation in judged.values()),
        failures=dict(failures.most_common()),
        reward=sum(rewards) / len(rewards) if rewards else None,
        chosen=chosen,
        problem=problem,
    )


def _iteration_at(position: int, version: int, config: "RlhfRunConfig | None") -> int | None:
    """Returns the iteration whose tasks begin at a position, from 1; None: it does not follow from that."""
    if config is None:
        return None
    group = config.rlhf
    # An iteration then takes tasks out of their order.
    if group.asynchronous:
        return None
    if not group.sampling_rounds:
        return position // group.prompts + 1
    # The weights that a run begins with draw several iterations.
    if version == 0 and group.max_staleness:
        return None
    return version + 1 + group.max_staleness


def _in_its_group(
    why: str,
    number: int | None,
    episode: "Episode",
    judged: Mapping[tuple[int, int], _Judged],
    config: "RlhfRunConfig | None",
) -> ChosenConversation:
    """Returns a conversation with what the others of its task say about it."""
    group = {
        sample: conversation
        for (position, sample), conversation in sorted(judged.items())
        if position == episode.position and conversation.reward is not None
    }
    rewards = [conversation.reward for conversation in group.values() if conversation.reward is not None]
    mean = sum(rewards) / len(rewards) if rewards else None

    advantage, penalty = None, 0.0
    if config is not None and episode.sample in group:
        advantages = group_advantages([*group.values()], config)
        advantage = advantages[[*group].index(episode.sample)] if advantages else None
        penalty = (config.rlhf.missing_eos_penalty or 0.0) if episode.cut else 0.0
    return ChosenConversation(why, number, episode, len(group), mean, advantage, penalty)


def group_advantages(group: Sequence[Any], config: "RlhfRunConfig") -> list[float]:
    """Returns the advantages of the conversations of a task, as the run's algorithm computes them; empty if it compares
    no groups.

    Args:
        group: at least one conversation with a verdict, as objects with `reward`, `cut` and `new_tokens`.
        config: has one part of the reward.
    """
    import torch

    from dist_lm.rlhf.algorithm import Experience, GroupKeys
    from dist_lm.rlhf.algorithms.registry import ALGORITHMS
    from dist_lm.rlhf.rewards import total_score

    settings = config.rlhf
    algorithm = ALGORITHMS[settings.algorithm]
    if not issubclass(algorithm.Keys, GroupKeys):
        return []

    reward_B = torch.tensor([conversation.reward for conversation in group], dtype=torch.float64)
    ended_B = torch.tensor([not conversation.cut for conversation in group])
    (part,) = settings.rewards
    score_B = total_score({part: reward_B}, settings.rewards, ended_B, settings.missing_eos_penalty or 0.0)

    # Advantages of a group follow from scores and lengths; log-probabilities only go into the loss.
    tokens_B = torch.tensor([max(1, conversation.new_tokens) for conversation in group])
    mask_BT = (torch.arange(int(tokens_B.max())) < tokens_B[:, None]).float()
    experience = Experience(
        mask_BT=mask_BT,
        score_B=score_B,
        prompt_B=torch.zeros_like(tokens_B),
        logprob_BT=torch.zeros_like(mask_BT),
        reference_logprob_BT=None,
        value_BT=None,
        importance_BT=None,
    )
    return algorithm(settings).prepare(experience, 0.0).tokens["advantage"][:, 0].tolist()
