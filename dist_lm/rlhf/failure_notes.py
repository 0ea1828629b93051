"""The log's lines on conversations without a reward. A broken environment breaks hundreds of them in one way."""

import logging
from collections import Counter

from dist_lm.environments.protocol import Failure, Task, Verdict
from dist_lm.errors import one_line

log = logging.getLogger(__name__)


class FailureNotes:
    """Notes why conversations have no reward: the first one of each reason as a warning, the others as information.

    Conversations that are drawn together share one object, which the thread of their event loop writes.
    """

    def __init__(self) -> None:
        self._num_of: Counter[Failure] = Counter()

    def note(self, task: Task, sample: int, verdict: Verdict) -> None:
        """Notes a conversation; one with a reward is not noted.

        Args:
            sample: number of the conversation among those about its task, from 0.
        """
        reason = verdict.failure_reason
        if verdict.valid or reason is None:
            return

        self._num_of[reason] += 1
        level = logging.WARNING if self._num_of[reason] == 1 else logging.INFO
        what = f"{reason}: {one_line(verdict.detail)}" if verdict.detail else reason
        log.log(level, "task %s, sample %d has no reward: %s", task.key, sample, what)

    def summarise(self, total: int) -> None:
        """Logs how many conversations had no reward, by reason, unless each of them was a warning already.

        Args:
            total: number of conversations that were drawn together.
        """
        failed = self._num_of.total()
        if failed > len(self._num_of):
            reasons = ", ".join(f"{reason} {count}" for reason, count in self._num_of.most_common())
            log.warning("%d of %d conversations have no reward (%s); the log names each", failed, total, reasons)
