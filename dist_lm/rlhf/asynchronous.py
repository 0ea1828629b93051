"""Asynchronous sampling: conversations go on while the learner updates, and an iteration takes the first groups.

A group is all conversations of a task. New weights reach the engines in the middle of answers, whose tokens, keys and
values stay (`generation.engine.Engine.swap_weights`), so nothing waits for the slowest environment.

    engines      draw draw draw draw draw draw draw draw draw draw draw draw     a thread: whatever is asked for
    groups       a=====  b==========   c====  d=================   e======       the event loop: tasks, in their order
                      |  weights 1  |       |  weights 2         |
    learner      wait | train a, b  | wait  | train c, ...                       the calling thread

A task begins only if the groups under way and those that wait are not more than max_staleness + 1 iterations take. A
group whose first token is older than `max_staleness` versions is refused, and its conversations end. Its tokens have no
known version before the first answer has ended, so groups are looked at then, and when the policy has a new version.

What happened by chance is the schedule (`schedule_record.py`). A run that is resumed takes the groups of the recorded
schedule as far as it goes, and samples from there on.

Dimensions: none; `rollouts_of_episodes` makes the arrays.
"""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, Self

from dist_lm.environments.protocol import Task
from dist_lm.errors import ArtefactError
from dist_lm.generation.decoder import WeightStream
from dist_lm.generation.request import Answer, Refusal, Request, RequestError
from dist_lm.rlhf.config import RlhfConfig
from dist_lm.rlhf.environment_rollouts import EnvironmentSupply, settings_digest
from dist_lm.rlhf.episodes import Episode, rollouts_of_episodes
from dist_lm.rlhf.request_feed import RequestFeed
from dist_lm.rlhf.rollouts import ScoredRollouts
from dist_lm.rlhf.schedule import Drawn
from dist_lm.rlhf.schedule_record import STALE, Assignment, ScheduleRecord, first_version, metrics_of


@dataclass(eq=False)
class _Group:
    """The conversations of a task, under way or finished."""

    position: int
    task: Task
    episodes: dict[int, Episode] = field(default_factory=dict)  # conversations that have ended, by sample
    holding: set[asyncio.Future[None]] = field(
        default_factory=set
    )  # conversations under way; for the event loop's thread
    version: int | None = None  # the oldest weights that drew a first token
    is_refused: bool = False

    def drawn_by(self, version: int | None) -> None:
        """Notes the weights that drew the first token of a conversation."""
        if version is not None:
            self.version = version if self.version is None else min(self.version, version)


def _episodes(groups: Sequence[_Group]) -> list[Episode]:
    """Returns the conversations of groups that have ended, by task, then by sample."""
    by_position = sorted(groups, key=lambda group: group.position)
    return [group.episodes[sample] for group in by_position for sample in sorted(group.episodes)]


class AsynchronousSchedule:
    """Samples conversations beside the learner, on the rank that has the engines. Takes the place of a
    `RolloutSchedule`. A context manager; leaving it ends the conversations under way.
    """

    def __init__(self, supply: EnvironmentSupply, config: RlhfConfig, seed: int, iterations: int) -> None:
        """
        Args:
            seed: of the run.
            iterations: length of the whole run.
        """
        self._supply, self._config, self._iterations = supply, config, iterations
        self._how = supply.conversing(config, seed)
        settings = settings_digest(config, seed, supply.limits, supply.judge.name)
        self._record = ScheduleRecord(supply.folder, settings, config.prompts)
        self._recorded: list[Assignment] = []  # the schedule that a resumed run follows
        self._recorded_episodes: dict[tuple[int, int], Episode] = {}

        # `_changed` guards the state that the learner's thread and the event loop's one share, down to `_error`.
        self._changed = threading.Condition()
        self._version = 0  # version of the policy
        self._groups: dict[int, _Group] = {}  # groups that are neither taken nor refused, by position
        self._finished: list[_Group] = []  # those of `_groups` that have ended, in this order
        self._over: set[int] = set()  # positions of tasks that were taken or refused, from `_next_position` on
        self._next_position = 0  # all tasks before it have begun
        self._refused: list[_Group] = []  # groups refused since the last assignment
        self._n_taken = 0
        self._error: BaseException | None = None

        self._leaving = asyncio.Event()
        self._todo: asyncio.Queue[tuple[_Group, int]] = asyncio.Queue()  # conversations that are to begin
        self._feed = RequestFeed(supply.alive)
        self._thread: threading.Thread | None = None
        self._sampling: Future[None] | None = None

    def begin(
        self,
        version: int,
        weights: WeightStream,
        pending: Mapping[int, ScoredRollouts],
        position: int = 0,
        taken: int = 0,
    ) -> None:
        """Starts, or resumes, with the weights of `version`, which are read to the end.

        Finished conversations are in the record, so a checkpoint has no `pending` ones.

        Raises:
            ArtefactError: the schedule of iterations up to `version` is not recorded, or damaged.
            UserError, PoolFailure: the source cannot load the weights.
        """
        assert not pending, "rollouts of a run that was not asynchronous"
        assert not taken, "the record tells what was taken"
        self._supply.source.load_weights(weights, version)
        self._version = version
        self._recorded = self._record.assignments()
        if self._record.folder is None:
            # Nothing tells which tasks were taken out of their order.
            self._over, self._n_taken = set(range(position)), version * self._config.prompts
        elif len(self._recorded) < version:
            raise ArtefactError(
                f"{self._record.folder}: the schedule ends after iteration {len(self._recorded)}, and the checkpoint "
                f"is of iteration {version}: restore the files from a copy"
            )

        for assignment in self._recorded[:version]:
            self._note(assignment)
        self._recorded_episodes = self._record.episodes(besides=self._over)
        for assignment in self._recorded[version:]:
            self._note(assignment)
        self._go_on(version)

    def push(self, version: int, weights: WeightStream) -> None:
        """Reads new weights to the end; engines go on by them soon. Groups that are now too old are refused.

        Raises:
            UserError, PoolFailure: the weights do not fit the model.
        """
        source = self._supply.source
        source.swap_weights(source.hold(weights), version)
        self._go_on(version)

    def take(self, iteration: int) -> Drawn:
        """Waits for as many groups as an iteration has tasks, and returns their conversations.

        Args:
            iteration: from 0; the version of the policy.

        Raises:
            RewardError: too many conversations have no verdict.
            RequestError: the engines refuse a request.
            ArtefactError: a conversation that the schedule names is not recorded.
            OSError: the schedule cannot be written.
            UserError, PoolFailure: of the source, see `RolloutSource`.
            Exception: what a conversation raises.
        """
        if iteration < len(self._recorded):
            assignment = self._recorded[iteration]
            refused = [key for key in sorted(self._recorded_episodes) if key[0] in assignment.refused]
            refused_episodes = [self._recorded_episodes[key] for key in refused]
            return self._drawn(assignment, self._episodes_of(assignment), refused_episodes)

        taken_groups = self._first_groups()
        with self._changed:
            refused, self._refused = self._refused, []
            assignment = Assignment(
                iteration + 1,
                tuple(group.position for group in taken_groups),
                {group.position: STALE for group in refused},
                carried=len(self._groups),
            )
        self._record.assign(assignment)
        return self._drawn(assignment, _episodes(taken_groups), _episodes(refused))

    def ahead(self, version: int) -> dict[int, ScoredRollouts]:
        """Returns nothing: a checkpoint needs no conversations, because the record has them."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is None or self._sampling is None:
            return
        self._supply.conversations.call_soon(self._leaving.set)
        wait([self._sampling])
        self._feed.leave()
        self._thread.join()
        self._supply.alive.passes = True

    # --- of the learner's thread ---

    @property
    def _samples(self) -> range:
        return range(self._config.rollouts_per_prompt)

    def _note(self, assignment: Assignment) -> None:
        """Counts the groups of a recorded assignment, whose tasks do not begin again."""
        self._over |= {*assignment.groups, *assignment.refused}
        self._n_taken += len(assignment.groups)

    def _go_on(self, version: int) -> None:
        """Refuses what is too old for this version of the policy, and lets new tasks begin. The first call after the
        recorded schedule starts the threads; inside that schedule, and after the last iteration, nothing begins.
        """
        with self._changed:
            self._version = version
            if version < len(self._recorded) or version >= self._iterations:
                return
            is_first = self._thread is None
            if is_first:
                self._take_over()
            for group in [*self._groups.values()]:
                self._refuse_if_stale(group)

        conversations = self._supply.conversations
        if not is_first:
            conversations.call_soon(self._admit)
            return
        self._sampling = conversations.begin(self._sample())
        self._sampling.add_done_callback(lambda sampling: self._fail(sampling.exception()))
        self._thread = threading.Thread(target=self._generate, name="rollouts")
        # Engines never pause, so they would hide that the learner, or a rank that it waits for, hangs.
        self._supply.alive.passes = False
        self._thread.start()

    def _take_over(self) -> None:
        """Makes groups of recorded conversations that no iteration has taken or refused; the caller holds `_changed`.

        A group that is complete counts as finished. The conversations that another one lacks are queued before those of
        new tasks. Conversations of another task than the one now at their position, or of a sample beyond
        `rollouts_per_prompt`, are dropped. No conversation starts here, and the next position stays.
        """
        for (position, sample), episode in sorted(self._recorded_episodes.items()):
            if position in self._over or sample not in self._samples:
                continue
            (task,) = self._supply.prompts(position, 1)
            group = self._groups.get(position) or _Group(position, task)
            # A file of tasks may have changed since, so another task may be at this position.
            if episode.task == task.digest:
                self._groups[position] = group
                group.episodes[sample] = episode
                group.drawn_by(first_version(episode))
        self._recorded_episodes = {}
        for group in self._groups.values():
            self._enqueue(group)
        self._finished = [group for group in self._groups.values() if len(group.episodes) == len(self._samples)]

    def _end(self, group: _Group) -> None:
        """Forgets a group that is taken or refused, and sees to it that its task does not begin again."""
        del self._groups[group.position]
        # Earlier positions need no entry, or the set would grow with the run.
        if group.position >= self._next_position:
            self._over.add(group.position)

    def _refuse_if_stale(self, group: _Group) -> None:
        """Refuses a group whose first token is too old for the present policy."""
        if group.is_refused or group.version is None or self._version - group.version <= self._config.max_staleness:
            return
        self._end(group)
        if group in self._finished:
            self._finished.remove(group)
        self._refused.append(group)
        group.is_refused = True
        self._supply.conversations.call_soon(lambda: [holding.cancel() for holding in group.holding])

    def _first_groups(self) -> list[_Group]:
        """Waits for the groups of an iteration and takes them: those that were finished first.

        Raises:
            Exception: what has ended the engines or a conversation.
        """
        count = self._config.prompts
        with self._changed:
            # Meanwhile only the engines show that the run is alive, so that one that hangs is found.
            with self._supply.alive.passing():
                self._changed.wait_for(lambda: len(self._finished) >= count or self._error is not None)
            if self._error is not None:
                raise self._error
            taken_groups, self._finished = self._finished[:count], self._finished[count:]
            for group in taken_groups:
                self._end(group)
            self._n_taken += count
        return taken_groups

    def _episodes_of(self, assignment: Assignment) -> list[Episode]:
        """Returns the recorded conversations of an assignment, by task, then by sample.

        Raises:
            ArtefactError: one is not recorded.
        """
        keys = [(position, sample) for position in sorted(assignment.groups) for sample in self._samples]
        for position, sample in keys:
            if (position, sample) not in self._recorded_episodes:
                raise ArtefactError(
                    f"{self._record.folder}: iteration {assignment.iteration} trained on conversation {sample + 1} of "
                    f"task {position}, which is not recorded: restore the files from a copy"
                )
        return [self._recorded_episodes[key] for key in keys]

    def _drawn(self, assignment: Assignment, episodes: Sequence[Episode], refused: Sequence[Episode]) -> Drawn:
        scored = self._supply.judge(rollouts_of_episodes(episodes))
        scored = replace(scored, replaced=len(assignment.refused))
        return Drawn(scored, 0.0, 0.0, metrics_of(assignment, episodes, refused))

    def _fail(self, error: BaseException | None) -> None:
        """Ends all threads for an error, which `take` raises; the first one counts. None: there is none."""
        if error is None:
            return
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        self._feed.abort()

    # --- of the engines' thread ---

    def _generate(self) -> None:
        results: Any = self._supply.source.results(self._feed)
        try:
            for result in results:
                if isinstance(result, Refusal):
                    raise RequestError(result.request, result.error)
                self._feed.deliver(result)
        except BaseException as error:
            self._fail(error)
        finally:
            results.close()

    # --- of the event loop's thread ---

    async def _sample(self) -> None:
        """Holds conversations until the learner leaves.

        Raises:
            Exception: what a conversation raises first; the others are cancelled.
        """
        self._admit()

        leaving = asyncio.ensure_future(self._leaving.wait())
        workers = [asyncio.ensure_future(self._work()) for _ in range(self._supply.at_once)]
        try:
            ended, _ = await asyncio.wait([leaving, *workers], return_when=asyncio.FIRST_COMPLETED)
            for worker in ended - {leaving}:
                worker.result()
        finally:
            # Conversations under way close their environments.
            for task in (leaving, *workers):
                task.cancel()
            await asyncio.gather(leaving, *workers, return_exceptions=True)

    def _admit(self) -> None:
        """Begins tasks, in their order, as long as iterations will take them soon enough."""
        with self._changed:
            # Not fewer at the end: the last iteration waits for no group that hangs.
            most = (self._version + self._config.max_staleness + 1) * self._config.prompts
            while self._n_taken + len(self._groups) < most:
                position = self._next_position
                self._next_position += 1
                if position in self._groups:
                    continue
                if position in self._over:
                    self._over.remove(position)
                    continue

                (task,) = self._supply.prompts(position, 1)
                self._groups[position] = _Group(position, task)
                self._enqueue(self._groups[position])

    def _enqueue(self, group: _Group) -> None:
        for sample in self._samples:
            if sample not in group.episodes:
                self._todo.put_nowait((group, sample))

    async def _work(self) -> None:
        """Holds one conversation after the other, until it is cancelled; conversations of a refused group are left out,
        or cancelled without an error.

        Raises:
            AbortedError: the engines have failed.
            OSError: the conversation cannot be written.
        """
        while True:
            group, sample = await self._todo.get()
            if group.is_refused:
                continue
            # A task of its own, so that a refused group ends without this worker.
            holding = asyncio.ensure_future(self._hold(group, sample))
            group.holding.add(holding)
            try:
                await asyncio.wait({holding})
            finally:
                holding.cancel()
                await asyncio.gather(holding, return_exceptions=True)
                group.holding.remove(holding)
            if not holding.cancelled():
                holding.result()

    async def _hold(self, group: _Group, sample: int) -> None:
        """Holds a conversation, records it, and notes if its group is finished.

        Raises:
            AbortedError: the engines have failed.
            OSError: the record cannot be written.
        """
        waiting = self._supply.waiting
        ask_timed = waiting.ask(self._feed.ask)
        has_begun = False

        async def ask(request: Request) -> Answer:
            nonlocal has_begun
            answer = await ask_timed(request)
            if not has_begun:
                # The version is known once the first answer has ended, and the policy may have left it behind by then.
                with self._changed:
                    group.drawn_by(answer.version)
                    self._refuse_if_stale(group)
                if group.is_refused:
                    self._admit()
            has_begun = True
            return answer

        host = waiting.host(self._supply.conversations.host)
        episode = await self._how.hold(host, group.task, group.position, sample, ask)
        with self._changed:
            if group.is_refused:
                return
            self._record.add(episode)
            group.episodes[sample] = episode
            if len(group.episodes) == len(self._samples):
                self._finished.append(group)
                self._changed.notify_all()
