"""The schedule of a run with `rlhf.asynchronous` as data: which iteration trained on which groups.

With the conversations, whose turns note the weights that drew each token, it is all that happened by chance: a run is
a function of seed, configuration, schedule and observations. A line is on disk, with the conversations that it names,
before its iteration trains, so there are never weights whose schedule is not known.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from dist_lm.errors import ArtefactError, one_line
from dist_lm.rlhf.environment_rollouts import file_name, recorded_positions
from dist_lm.rlhf.episodes import DAMAGES, Episode, EpisodeFile, line_of
from dist_lm.storage import durable

STALE = "stale"  # reason to refuse a group: the weights that began it are too old

SCHEDULE = "schedule.jsonl"  # beside the files of conversations


@dataclass(frozen=True)
class Assignment:
    """The groups of an iteration. A group, the conversations of a task, is named by the task's position."""

    iteration: int  # from 1, as in metrics
    groups: tuple[int, ...]  # groups that it trains on, in the order in which they were finished
    refused: Mapping[int, str] = field(default_factory=dict)  # groups dropped since the iteration before -> the reason
    carried: int = 0  # other groups that were under way or finished when it began

    def __post_init__(self) -> None:
        numbers = [self.iteration, self.carried, *self.groups, *self.refused]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a number is no integer from 0 on")


def metrics_of(
    assignment: Assignment, episodes: Sequence[Episode], refused: Sequence[Episode] = ()
) -> dict[str, float]:
    """Returns what an iteration tells about its schedule.

    Args:
        episodes: the conversations of its groups.
        refused: conversations of refused groups that had ended.
    """
    # The policy before iteration i, from 1, has version i - 1.
    policy = assignment.iteration - 1
    with_verdict = [episode for episode in episodes if episode.samples]
    age_M = np.array([policy - version for e in with_verdict for version in versions_of_tokens(e)], np.int64)
    n_tasks = len(assignment.groups) + len(assignment.refused)
    metrics = {
        "rollout/token_staleness_mean": float(age_M.mean()) if len(age_M) else 0.0,
        "rollout/token_staleness_max": float(age_M.max(initial=0)),
        "rollout/groups_carried": float(assignment.carried),
        f"rollout/refused_{STALE}": 0.0,
    }
    for reason, count in Counter(assignment.refused.values()).items():
        metrics[f"rollout/refused_{reason}"] = count / n_tasks

    # Slow groups are refused, so rewards of the others flatter a policy that is slow where it is bad.
    reward_B, refused_reward_B = (_rewards(chosen) for chosen in (episodes, refused))
    if len(reward_B) and len(refused_reward_B):
        metrics["rollout/refused_reward_gap"] = float(refused_reward_B.mean() - reward_B.mean())
    return metrics


def _rewards(episodes: Sequence[Episode]) -> np.ndarray:
    """Returns the rewards of the conversations that have a verdict, fp64."""
    return np.array([episode.reward for episode in episodes if episode.reward is not None], np.float64)


def versions_of_tokens(episode: Episode) -> Iterator[int]:
    """Yields the weights that drew each token of the model, in their order."""
    for turn in episode.turns:
        changes = list(turn.versions or ((0, episode.version),))
        for token in range(turn.new_tokens):
            # A version that came after n tokens were read drew what follows token n.
            while len(changes) > 1 and changes[1][0] < token:
                del changes[0]
            yield changes[0][1]


def first_version(episode: Episode) -> int | None:
    """Returns the weights that drew the first token; None: the environment failed before there was one."""
    return episode.version if episode.turns else None


@dataclass
class ScheduleRecord:
    """The schedule and the conversations of a run, in its folder."""

    folder: Path | None  # None: nothing is written
    settings: str  # digest of all that conversations depend on, as in `EpisodeFile`
    tasks_a_file: int  # conversations of this many tasks, by position, are in one file

    def assignments(self) -> list[Assignment]:
        """Returns the assignments of all iterations so far. A last line that a kill has torn is removed.

        Raises:
            ArtefactError: another line is damaged, or belongs to other settings.
        """
        if self.folder is None or not (self.folder / SCHEDULE).is_file():
            return []
        path = self.folder / SCHEDULE
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        # Its iteration has not begun.
        if lines and not lines[-1].endswith("\n"):
            durable.write_text(path, "".join(lines[:-1]))
        return read_assignments(path, self.settings)

    def episodes(self, besides: Set[int] = frozenset()) -> dict[tuple[int, int], Episode]:
        """Returns the conversations that are recorded, by (position, sample). Damaged lines are removed.

        Args:
            besides: positions of tasks that nobody asks for. Files that hold no others are not read, so a restart costs
                as much in a long run as in a short one.
        """
        episodes: dict[tuple[int, int], Episode] = {}
        if self.folder is None:
            return episodes
        for first in recorded_positions(self.folder):
            if not besides >= {*range(first, first + self.tasks_a_file)}:
                with EpisodeFile(self.folder / file_name(first), self.settings) as file:
                    episodes |= file.finished
        return episodes

    def add(self, episode: Episode) -> None:
        """Appends a conversation, which a process that is killed later does not lose.

        Raises:
            OSError: the line cannot be written.
        """
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            _append(self._file_of(self.folder, episode.position), line_of(episode, self.settings))

    def assign(self, assignment: Assignment) -> None:
        """Appends an assignment, and flushes it to disk with the conversations that it names.

        Raises:
            OSError: it cannot be written.
        """
        if self.folder is None:
            return
        for path in sorted({self._file_of(self.folder, position) for position in assignment.groups}):
            durable.fsync(path)
        # The names of new files must be on disk before the line that needs them.
        durable.fsync(self.folder)

        value = asdict(assignment)
        line = json.dumps({"settings": self.settings, "crc32": _checksum(value), "assignment": value}) + "\n"
        _append(self.folder / SCHEDULE, line)
        durable.fsync(self.folder / SCHEDULE)
        durable.fsync(self.folder)

    def _file_of(self, folder: Path, position: int) -> Path:
        return folder / file_name(position // self.tasks_a_file * self.tasks_a_file)


def read_assignments(path: Path, settings: str) -> list[Assignment]:
    """Returns the assignments in a file, of iterations 1, 2, ... A last line without its end is not there yet.

    Raises:
        ArtefactError: the file cannot be read, a line is damaged, or belongs to other settings or another iteration.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror}): restore the file from a copy") from error

    assignments: list[Assignment] = []
    for number, line in enumerate(_whole(lines), 1):
        try:
            content = json.loads(line)
            value = content["assignment"]
            if content["crc32"] != _checksum(value):
                raise ValueError("its checksum differs")
            refused = {int(position): str(reason) for position, reason in value["refused"].items()}
            assignment = Assignment(value["iteration"], tuple(value["groups"]), refused, value["carried"])
        except DAMAGES as error:
            raise ArtefactError(
                f"{path}: line {number} is damaged ({one_line(str(error))}): restore the file from a copy"
            ) from error
        if content["settings"] != settings:
            raise ArtefactError(f"{path}: line {number} was recorded under other settings: restore those of the run")
        if assignment.iteration != number:
            raise ArtefactError(
                f"{path}: line {number} is of iteration {assignment.iteration}: restore the file from a copy"
            )
        assignments.append(assignment)
    return assignments


def _whole(lines: Iterable[str]) -> Iterator[str]:
    return (line for line in lines if line.endswith("\n"))


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def _checksum(value: object) -> int:
    return zlib.crc32(json.dumps(value).encode())
