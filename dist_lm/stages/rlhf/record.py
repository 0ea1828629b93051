"""The conversations that a run of stage `rlhf` has recorded, iteration by iteration. Nothing is written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from dist_lm.environments.protocol import Task
from dist_lm.errors import ArtefactError
from dist_lm.rlhf.environment_rollouts import file_name, recorded_positions, settings_digest
from dist_lm.rlhf.episodes import Episode, recorded_lines, rollouts_of_episodes
from dist_lm.rlhf.learner import conversation_metrics, score_metrics
from dist_lm.rlhf.rewards import total_score, usable_of
from dist_lm.rlhf.rollouts import Rollouts, ScoredRollouts, ShuffledPrompts
from dist_lm.rlhf.schedule import SamplingAgain
from dist_lm.rlhf.schedule_record import SCHEDULE, Assignment, first_version, read_assignments
from dist_lm.rlhf.schedule_record import metrics_of as schedule_metrics
from dist_lm.stages.rlhf.config import RlhfRunConfig
from dist_lm.stages.rlhf.environment_tasks import read_tasks
from dist_lm.stages.rlhf.models import START, frozen_models
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.metrics import read_metrics
from dist_lm.training import checkpoint_files


@dataclass(frozen=True)
class RecordedIteration:
    """The conversations of an iteration."""

    number: int  # from 1, as in metrics and in the names of checkpoints
    version: int  # the weights that drew them, with rlhf.asynchronous the oldest: the policy after so many iterations
    episodes: list[Episode]  # by task, then by sample
    scored: ScoredRollouts | None  # those of the tasks that were trained on; None: some are not recorded yet
    assignment: Assignment | None = None  # with rlhf.asynchronous
    refused: Sequence[Episode] = ()  # conversations that had ended in groups that it refused

    @property
    def versions(self) -> set[int]:
        """The weights that drew some token."""
        pairs = [pair for episode in self.episodes for turn in episode.turns for pair in turn.versions]
        return {version for _, version in pairs} or {self.version}


class _UnfinishedError(Exception):
    """Raised where the run is still drawing the conversations of an iteration."""


def remove_old_conversations(run: RunDirectory) -> None:
    """Removes the conversations of iterations before the oldest checkpoint of a run, which no restart needs.

    Raises:
        ArtefactError: that checkpoint is damaged.
        OSError: a file cannot be removed.
    """
    oldest, *_ = checkpoint_files.steps_in(run.checkpoints) or [None]
    if oldest is None:
        return
    try:
        position = checkpoint_files.read_state(oldest)[0].position
    except ArtefactError:
        # A save in a thread removes old checkpoints meanwhile; the next one calls this again.
        if oldest.is_dir():
            raise
        return
    for recorded in recorded_positions(run.conversations):
        if recorded < position:
            (run.conversations / file_name(recorded)).unlink(missing_ok=True)


def recorded_run(run: RunDirectory, config: RlhfRunConfig) -> "ConversationRecord":
    """Returns the record of a run.

    Raises:
        ArtefactError: the run keeps no conversations, has recorded none yet, or a file of its tasks or its constraint
            has changed.
        ConfigError: such a file is gone.
        OSError: a file cannot be read.
    """
    if not config.rlhf.environment:
        raise ArtefactError(
            f"{run.path}: a run without rlhf.environment keeps some rollouts as text (samples/) and none as tokens, so "
            "there is nothing to replay; give a run with rlhf.environment"
        )
    if not recorded_positions(run.conversations):
        raise ArtefactError(f"{run.conversations}: no conversations are recorded there yet")

    # Turns that are drawn again need no environment, so that its file may be edited meanwhile.
    noted = {name: files for name, files in config.noted_files.items() if name.startswith("rlhf.")}
    noted.pop(f"rlhf.environment={config.rlhf.environment}", None)
    run.require_files(noted)
    return ConversationRecord(run, config, ShuffledPrompts(read_tasks(config.rlhf)[0], config.seed))


@dataclass(frozen=True)
class ConversationRecord:
    """The record of a run with `rlhf.environment`; see `recorded_run`."""

    run: RunDirectory
    config: RlhfRunConfig
    tasks: ShuffledPrompts[Task]

    def require_environment(self) -> None:
        """Refuses a file of the environment's class or program that has changed.

        Raises:
            ArtefactError: it has.
        """
        if files := self.config.rlhf.environment_files:
            self.run.require_files({f"rlhf.environment={self.config.rlhf.environment}": files})

    def iterations(self, only: int | None = None) -> Iterator[RecordedIteration]:
        """Yields the recorded iterations in their order; the last one may be unfinished.

        Args:
            only: the number of the only one to yield.

        Raises:
            ArtefactError: there is no such iteration, a file is missing or damaged, or its conversations belong to
                other settings, weights or tasks.
        """
        if self.config.rlhf.asynchronous:
            yield from self._assigned(only)
            return
        group = self.config.rlhf
        position, number = self._first()
        # Without tasks that are replaced, each iteration has the same number of them.
        if only is not None and not group.sampling_rounds:
            position, number = (only - 1) * group.prompts, only

        while self._is_recorded(position, number):
            iteration, n_tasks = self._iteration(position, number)
            if only in (None, number):
                yield iteration
            if only == number:
                return
            if iteration.scored is None:
                break
            position, number = position + n_tasks, number + 1
        if only is not None:
            raise ArtefactError(f"{self.run.conversations}: no conversations of iteration {only} are recorded there")

    def _assigned(self, only: int | None) -> Iterator[RecordedIteration]:
        """Yields the iterations of an asynchronous schedule; those that have not begun are not there.

        Raises:
            ArtefactError: as `iterations`.
        """
        path = self.run.conversations / SCHEDULE
        group = self.config.rlhf
        settings = settings_digest(group, self.config.seed, group.environment_limits.limits, group.environment)
        assignments = read_assignments(path, settings) if path.exists() else []
        if not assignments or (only is not None and only > len(assignments)):
            raise ArtefactError(f"{path}: iteration {only or 1} has not begun yet")

        # Groups of an iteration are of a few files, which later iterations share.
        n_files = group.max_staleness + 3
        recorded_in = lru_cache(maxsize=n_files)(lambda name: self._all_in(self.run.conversations / name, settings))
        for assignment in assignments:
            if only not in (None, assignment.iteration):
                continue
            episodes: list[Episode] = []
            for position in sorted(assignment.groups):
                name = file_name(position // group.prompts * group.prompts)
                for sample in range(group.rollouts_per_prompt):
                    if (position, sample) not in recorded_in(name):
                        raise ArtefactError(
                            f"{self.run.conversations / name}: conversation {sample + 1} of task {position} is "
                            f"missing, on which iteration {assignment.iteration} trained: restore the file from a copy"
                        )
                    episodes.append(recorded_in(name)[position, sample])

            refused: list[Episode] = []
            for position in sorted(assignment.refused):
                name = file_name(position // group.prompts * group.prompts)
                # There is no file if none of its conversations has ended.
                if (self.run.conversations / name).exists():
                    refused += [recorded_in(name)[key] for key in sorted(recorded_in(name)) if key[0] == position]

            scored = replace(self._judged(rollouts_of_episodes(episodes)), replaced=len(assignment.refused))
            # The environment may have failed before there was a token.
            versions = [version for episode in episodes if (version := first_version(episode)) is not None]
            oldest = min(versions, default=assignment.iteration - 1)
            yield RecordedIteration(assignment.iteration, oldest, episodes, scored, assignment, refused)

    def _all_in(self, path: Path, settings: str) -> dict[tuple[int, int], Episode]:
        """Returns the conversations of a file, by (position, sample).

        Raises:
            ArtefactError: the file is missing or damaged, or holds conversations of other settings or tasks.
        """
        episodes: dict[tuple[int, int], Episode] = {}
        try:
            for line in recorded_lines(path):
                episode = line.episode
                (task,) = self.tasks(episode.position, 1)
                if line.settings != settings or episode.task != task.digest:
                    raise ArtefactError(
                        f"{path}: line {line.number} has other settings or another task than the run: restore "
                        f"{self.run.config} and the tasks of {self.config.rlhf.prompts_from}"
                    )
                episodes[episode.position, episode.sample] = episode
        except OSError as error:
            raise ArtefactError(f"{path}: cannot be read ({error.strerror}): restore the file from a copy") from error
        return episodes

    def _first(self) -> tuple[int, int]:
        """Returns (position of the first task, number) of the first iteration that is recorded.

        Raises:
            ArtefactError: a line is damaged, or the iteration cannot be told.
        """
        position, group = recorded_positions(self.run.conversations)[0], self.config.rlhf
        # Nothing removes conversations then: earlier ones are missing.
        if group.keep_conversations or position == 0:
            return 0, 1
        if not group.sampling_rounds:
            return position, position // group.prompts + 1

        path = self.run.conversations / file_name(position)
        version = next((line.episode.version for line in recorded_lines(path)), 0)
        if version == 0:
            raise ArtefactError(
                f"{path}: earlier conversations were removed (rlhf.keep_conversations=false), and the weights that the "
                "run began with draw several iterations: wait for the next checkpoint"
            )
        return position, version + 1 + group.max_staleness

    def _is_recorded(self, position: int, number: int) -> bool:
        """Returns whether there is a record of the iteration whose first task is at this position.

        Raises:
            ArtefactError: there is none, though later iterations, or a checkpoint after it, are there.
        """
        path = self.run.conversations / file_name(position)
        if path.is_file():
            return True
        if self._is_over(position, number):
            raise ArtefactError(
                f"{path}: the conversations of iteration {number} are missing: restore the file from a copy, or replay "
                "other iterations by --iteration"
            )
        return False

    def _is_over(self, position: int, number: int) -> bool:
        """Returns whether the run has finished the iteration, or drawn what follows the tasks at this position."""
        has_later = any(later > position for later in recorded_positions(self.run.conversations))
        return has_later or checkpoint_files.newest_step(self.run.checkpoints) >= number

    def _iteration(self, position: int, number: int) -> tuple[RecordedIteration, int]:
        """Returns an iteration, and the number of tasks that were drawn for it.

        Raises:
            ArtefactError: as `iterations`.
        """
        group = self.config.rlhf
        version = max(0, number - 1 - group.max_staleness)
        episodes: list[Episode] = []

        def draw(position: int, prompts: int) -> Rollouts:
            recorded, is_whole = self._recorded(position, prompts, number, version)
            episodes.extend(recorded)
            if not is_whole:
                raise _UnfinishedError
            return rollouts_of_episodes(recorded)

        # What was drawn next depended on the verdicts, so it follows from the record.
        try:
            if group.sampling_rounds:
                again = SamplingAgain(draw, self._judged, group.rewards, group.prompts, group.sampling_rounds)
                scored = again(position)
            else:
                scored = self._judged(draw(position, group.prompts))
        except _UnfinishedError:
            return RecordedIteration(number, version, episodes, None), 0
        return RecordedIteration(number, version, episodes, scored), scored.prompts

    def _judged(self, rollouts: Rollouts) -> ScoredRollouts:
        (part,) = self.config.rlhf.rewards
        return ScoredRollouts(rollouts, {part: rollouts.reward_B})

    def _recorded(self, position: int, prompts: int, iteration: int, version: int) -> tuple[list[Episode], bool]:
        """Returns the conversations of one file, by task, then by sample, and whether all are there.

        Raises:
            ArtefactError: as `iterations`.
        """
        path = self.run.conversations / file_name(position)
        # With tasks that are replaced, the run may be between two draws of an iteration.
        if not path.is_file() and not self._is_over(position, iteration):
            return [], False

        group, samples = self.config.rlhf, self.config.rlhf.rollouts_per_prompt
        settings = settings_digest(group, self.config.seed, group.environment_limits.limits, group.environment)
        digests = [task.digest for task in self.tasks(position, prompts)]
        episodes: dict[tuple[int, int], Episode] = {}
        try:
            for line in recorded_lines(path):
                episode = line.episode
                problem = None
                if line.settings != settings:
                    problem = f"was recorded under other settings than {self.run.config} has: restore that file"
                elif not (0 <= episode.position - position < prompts and episode.sample < samples):
                    problem = f"belongs to task {episode.position}, sample {episode.sample}, which the file cannot hold"
                elif episode.version != version:
                    problem = f"was drawn by the weights after iteration {episode.version}, expected {version}"
                elif episode.task != digests[episode.position - position]:
                    problem = f"has another task than {group.prompts_from}: restore those tasks"
                elif (episode.position, episode.sample) in episodes:
                    problem = "repeats the conversation of an earlier line"
                if problem:
                    way_out = "" if ": restore" in problem else ": restore the file from a copy"
                    raise ArtefactError(f"{path}: line {line.number} {problem}{way_out}")
                episodes[episode.position, episode.sample] = episode
        except OSError as error:
            raise ArtefactError(
                f"{path}: cannot be read ({error.strerror}): restore the file from a copy, or replay other iterations "
                "by --iteration"
            ) from error

        n_missing = prompts * samples - len(episodes)
        if n_missing and self._is_over(position, iteration):
            raise ArtefactError(
                f"{path}: {n_missing} of {prompts * samples} conversations of iteration {iteration} are missing: "
                "restore the file from a copy, or replay other iterations by --iteration"
            )
        return [episodes[key] for key in sorted(episodes)], not n_missing

    # --- metrics ---

    @cached_property
    def _written(self) -> dict[int, dict[str, float | None]]:
        """The metrics that the run has written, by step."""
        steps: dict[int, dict[str, float | None]] = {}
        if self.run.metrics.is_file():
            for line in read_metrics(self.run.metrics):
                steps.setdefault(line["step"], {}).update(line)
        return steps

    def metrics_of(self, iteration: RecordedIteration) -> dict[str, tuple[float, float | None]]:
        """Returns metrics of a whole iteration that follow from its conversations alone, as (computed, written).

        Of these, the ones that the run has written; none if its line is not there (`stage.log_every`).

        Raises:
            ArtefactError: the metrics file is damaged.
        """
        assert iteration.scored is not None
        group, written = self.config.rlhf, self._written.get(iteration.number, {})
        usable = usable_of(iteration.scored, some=False)
        computed = conversation_metrics(iteration.scored.rollouts) | usable.metrics
        computed["rollout/prompts"] = float(usable.prompts)
        if usable.kept_D.any():
            rollouts, part_B = usable.rollouts, usable.rule_score_B
            ended_B, prompt_B = torch.from_numpy(rollouts.ended), torch.from_numpy(rollouts.position_B)
            score_B = total_score(part_B, group.rewards, ended_B, group.missing_eos_penalty or 0.0)
            computed |= score_metrics(iteration.number - 1, rollouts, score_B, prompt_B)
            computed |= {f"rlhf/part_{name}": mean for name, mean in usable.means(part_B).items()}
        if iteration.assignment:
            computed |= schedule_metrics(iteration.assignment, iteration.episodes, iteration.refused)
        return {name: (value, written[name]) for name, value in computed.items() if name in written}

    def is_equal(self, computed: float, written: float | None) -> bool:
        """Returns whether a metric is the one written: the same number, or without its last bits if a GPU added up."""
        if written is None:
            return not np.isfinite(computed)
        return bool(np.isclose(computed, written, rtol=0 if self.config.device == "cpu" else 1e-9, atol=0))

    # --- weights ---

    def weights_of(self, version: int) -> Path | None:
        """Returns the checkpoint with the weights of the policy after `version` iterations; None: it is not kept.

        The files are not verified.

        Raises:
            ArtefactError: what a checkpoint says of its run's start cannot be read, or a candidate has no manifest.
        """
        if version:
            checkpoint = self.run.checkpoints / checkpoint_files.step_name(version)
            return checkpoint if checkpoint.is_dir() else None

        if self.config.stage.init_from == "none":
            return None
        try:
            named = checkpoint_files.find_checkpoint(Path(self.config.stage.init_from))
        except ArtefactError:  # it is gone, which the caller says
            named = None

        # The path may lead to another checkpoint by now; those of the run name the one that it began with.
        for checkpoint in reversed(checkpoint_files.steps_in(self.run.checkpoints)):
            if start := (frozen_models(checkpoint) or {}).get(START):
                candidates = [path for path in (Path(start["base"]), named) if path and path.is_dir()]
                digests = {checkpoint_files.fingerprint(path): path for path in candidates}
                return digests.get(start["base_sha256"])
        return named
