"""Finished conversations with an environment, and the file that keeps them: a restarted run does not repeat them.

A line of the file is one conversation with everything that its training needs: ids, log-probabilities, what the
environment answered, rewards by turn and the verdict. Conversations are appended as they end, in any order.
"""

import base64
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from dist_lm.chat.messages import Json
from dist_lm.environments.protocol import FAILURES, Verdict
from dist_lm.errors import ArtefactError, one_line
from dist_lm.generation.request import Versions
from dist_lm.rlhf.rollouts import CUTS, FINISHES, Rollouts
from dist_lm.rlhf.transcript import Sample
from dist_lm.storage import durable

log = logging.getLogger(__name__)

NO_FAILURE = -1
DAMAGES = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a damaged line raises."""


@dataclass(frozen=True)
class Turn:
    """A turn of the model, and what the environment made of it."""

    new_tokens: int
    is_readable: bool  # whether its calls could be read
    action: Json  # as `environments.values.action_value`
    step: Json = None  # as `environments.values.step_value`; None: the environment failed in it
    reward: float = 0.0  # this turn alone
    tool_errors: int = 0  # results of its calls that are objects with `error`
    versions: Versions = ()  # the weights that drew its tokens, as `Answer.versions`; empty: those of the conversation


@dataclass(frozen=True)
class Episode:
    """A finished conversation."""

    position: int  # its task's in the order of tasks
    sample: int  # number among the conversations of its task
    task: str  # digest
    version: int  # the weights that drew all turns, or with rlhf.asynchronous the first token
    verdict: Verdict
    cut: str = ""  # the limit that ended it, one of CUTS
    opening: Json = None  # the observation of `reset`, as `environments.values.observation_value`
    turns: tuple[Turn, ...] = ()
    samples: tuple[Sample, ...] = ()
    logprobs: tuple[float, ...] = ()  # nats; of each token that the model drew, in the order of the samples
    sets: tuple[bytes, ...] = ()  # with filters or a constraint: the tokens among which each was drawn

    @property
    def reward(self) -> float | None:
        """The sum of the rewards of all turns and the verdict; None: there is no verdict."""
        if self.verdict.reward is None:
            return None
        return sum(turn.reward for turn in self.turns) + self.verdict.reward


def rollouts_of_episodes(episodes: Sequence[Episode]) -> Rollouts:
    """Returns conversations as arrays, in their order. Either all have sets of tokens, or none has."""
    samples = [sample for episode in episodes for sample in episode.samples]
    token_sets = [packed for episode in episodes for packed in episode.sets]
    drawn = [is_drawn for sample in samples for is_drawn in sample.drawn]
    rewards = [episode.reward for episode in episodes]

    def column(values: Iterable[int]) -> np.ndarray:
        return np.array([*values], np.int64)

    def failure_of(verdict: Verdict) -> int:
        return NO_FAILURE if verdict.failure_reason is None else FAILURES.index(verdict.failure_reason)

    return Rollouts(
        tokens_N=column(token for sample in samples for token in sample.ids),
        logprobs_M=np.array([logprob for episode in episodes for logprob in episode.logprobs], np.float32),
        prompt_tokens_B=column(sum(s.drawn.count(False) for s in episode.samples) for episode in episodes),
        new_tokens_B=column(len(episode.logprobs) for episode in episodes),
        finish_B=column(FINISHES.index("length" if episode.cut else "stop") for episode in episodes),
        version_B=column(episode.version for episode in episodes),
        position_B=column(episode.position for episode in episodes),
        sample_B=column(episode.sample for episode in episodes),
        set_size_M=np.array([len(packed) for packed in token_sets], np.int32),
        sets_X=np.array(bytearray().join(token_sets), np.uint8),
        drawn_N=np.array(drawn, np.uint8),
        sample_tokens_S=column(len(sample.ids) for sample in samples),
        samples_B=column(len(episode.samples) for episode in episodes),
        turns_B=column(len(episode.turns) for episode in episodes),
        unreadable_B=column(sum(not turn.is_readable for turn in episode.turns) for episode in episodes),
        tool_errors_B=column(sum(turn.tool_errors for turn in episode.turns) for episode in episodes),
        cut_B=column(CUTS.index(episode.cut) for episode in episodes),
        failure_B=column(failure_of(episode.verdict) for episode in episodes),
        reward_B=np.array([np.nan if reward is None else reward for reward in rewards], np.float64),
    )


# --- the file ---


@dataclass
class EpisodeFile:
    """The conversations of some tasks, appended line by line. A context manager; leaving it flushes the file to disk.

    Opening reads the conversations that an earlier attempt has finished. A line that is cut off or damaged, or that
    another configuration or another version of the weights has written, is dropped: its conversation is held again.
    """

    path: Path
    settings: str | None  # digest of all that conversations depend on, beside weights and task; None: any
    version: int | None = None  # the weights'; None: any
    finished: dict[tuple[int, int], Episode] = field(init=False, default_factory=dict)  # keys: (position, sample)
    _file: IO[str] = field(init=False)

    def __enter__(self) -> Self:
        lines = []
        if self.path.exists():
            for number, line in enumerate(self.path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                episode = self._episode_of(line, number)
                if episode is not None:
                    lines.append(line)
                    self.finished[episode.position, episode.sample] = episode

        # Lines that are dropped must not stay between those that are appended.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(self.path, "".join(f"{line}\n" for line in lines))
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        durable.fsync(self.path)

    def add(self, episode: Episode) -> None:
        """Appends a conversation, which a process that is killed later does not lose.

        Raises:
            OSError: the line cannot be written.
        """
        self._file.write(line_of(episode, self.settings))
        self._file.flush()

    def _episode_of(self, line: str, number: int) -> Episode | None:
        """Returns the conversation of a line; None if it is not to be used, because the line is damaged (a warning is
        logged) or is of other settings or weights.
        """
        try:
            settings, episode = _parsed(line)
        except DAMAGES as error:
            log.warning("%s: line %d is damaged (%s); its conversation is held again", self.path, number, error)
            return None
        is_of_run = self.settings in (None, settings) and self.version in (None, episode.version)
        return episode if is_of_run else None


def line_of(episode: Episode, settings: str | None) -> str:
    """Returns the line of a conversation in a file, with its end; `settings`: see `EpisodeFile`."""
    value = _value_of(episode)
    return json.dumps({"settings": settings, "crc32": _checksum(value), "episode": value}) + "\n"


def read_episodes(path: Path) -> list[Episode]:
    """Returns the conversations of a file in the order of (position, sample); damaged lines are left out with a
    warning.

    Raises:
        OSError: the file cannot be read.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    reader = EpisodeFile(path, settings=None)
    episodes = [reader._episode_of(line, number) for number, line in enumerate(lines, 1)]
    return sorted((e for e in episodes if e is not None), key=lambda episode: (episode.position, episode.sample))


@dataclass(frozen=True)
class RecordedLine:
    """A conversation in a file of conversations."""

    number: int  # of the line, from 1
    settings: str  # see `EpisodeFile`
    episode: Episode


def recorded_lines(path: Path) -> Iterator[RecordedLine]:
    """Yields all conversations of a file, in the order of its lines. A last line without its end is not there yet.

    Raises:
        ArtefactError: a line is damaged.
        OSError: the file cannot be read.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                settings, episode = _parsed(line)
            except DAMAGES as error:
                raise ArtefactError(
                    f"{path}: line {number} is damaged ({one_line(str(error))}): restore the file from a copy, or "
                    "replay other iterations by --iteration"
                ) from error
            yield RecordedLine(number, settings, episode)


def _parsed(line: str) -> tuple[str, Episode]:
    """Returns (settings, conversation) of a line.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError: it is damaged.
    """
    content = json.loads(line)
    if content["crc32"] != _checksum(content["episode"]):
        raise ValueError("its checksum differs")
    episode = _episode_of(content["episode"])
    _check(episode)
    return content["settings"], episode


def _check(episode: Episode) -> None:
    """Refuses a conversation whose numbers do not fit together.

    Raises:
        ValueError, TypeError: they do not.
    """
    counts = [episode.position, episode.sample, episode.version, *(turn.new_tokens for turn in episode.turns)]
    ids = [token for sample in episode.samples for token in sample.ids]
    if not all(type(number) is int and number >= 0 for number in (*counts, *ids)):
        raise ValueError("a number is no integer from 0 on")
    for versions in (turn.versions for turn in episode.turns if turn.versions):
        numbers = [n_read for n_read, _ in versions]
        if numbers[0] != 0 or numbers != sorted(numbers) or min(version for _, version in versions) < 0:
            raise ValueError("the versions of a turn are not in the order of its tokens")
    if not all(isinstance(turn.reward, int | float) for turn in episode.turns) or not isinstance(episode.task, str):
        raise ValueError("a reward is no number, or the digest of the task no text")
    if episode.cut not in CUTS:
        raise ValueError(f"cut by {episode.cut!r:.40}")
    if any(len(sample.drawn) != len(sample.ids) for sample in episode.samples):
        raise ValueError("ids and their marks differ in number")

    n_drawn = sum(sum(sample.drawn) for sample in episode.samples)
    # Of a conversation without a verdict no ids are recorded.
    n_of_turns = sum(turn.new_tokens for turn in episode.turns) if episode.verdict.valid else 0
    if not n_drawn == n_of_turns == len(episode.logprobs) or len(episode.sets) not in (0, n_drawn):
        raise ValueError("tokens of turns, log-probabilities and sets differ in number")


def _checksum(value: Json) -> int:
    return zlib.crc32(json.dumps(value).encode())


def _value_of(episode: Episode) -> dict[str, Json]:
    verdict = episode.verdict
    return {
        **{name: getattr(episode, name) for name in ("position", "sample", "task", "version", "cut", "opening")},
        "verdict": [verdict.reward, verdict.failure_reason, verdict.detail],
        "turns": [_value_of_turn(turn) for turn in episode.turns],
        "samples": [{"ids": sample.ids, "drawn": "".join("01"[d] for d in sample.drawn)} for sample in episode.samples],
        # The shortest decimals that are these fp32 numbers.
        "logprobs": [float(str(np.float32(logprob))) for logprob in episode.logprobs],
        "sets": [base64.b64encode(packed).decode() for packed in episode.sets],
    }


def _value_of_turn(turn: Turn) -> dict[str, Json]:
    value = dict(vars(turn))
    # Where weights change between iterations alone, the conversation says all.
    if not turn.versions:
        del value["versions"]
    return value


def _turn_of(value: dict[str, Any]) -> Turn:
    fields = dict(value)
    fields["versions"] = tuple((int(n_read), int(version)) for n_read, version in value.get("versions", ()))
    return Turn(**fields)


def _episode_of(value: dict[str, Any]) -> Episode:
    """Returns the conversation of a value of `_value_of`.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    reward, reason, detail = value["verdict"]
    samples = tuple(Sample(sample["ids"], [d == "1" for d in sample["drawn"]]) for sample in value["samples"])
    return Episode(
        **{name: value[name] for name in ("position", "sample", "task", "version", "cut", "opening")},
        verdict=Verdict.of(reward) if reason is None else Verdict.failed(reason, detail),
        turns=tuple(map(_turn_of, value["turns"])),
        samples=samples,
        logprobs=tuple(float(np.float32(logprob)) for logprob in value["logprobs"]),
        sets=tuple(base64.b64decode(packed) for packed in value["sets"]),
    )
