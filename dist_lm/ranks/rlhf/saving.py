"""Checkpoints of a run of stage `rlhf`: policy, critic, both optimizers, and the stage's own state."""

import time
from dataclasses import dataclass

from dist_lm.ranks.rlhf.models import Begun, saved_files, train_state
from dist_lm.ranks.rlhf.report import Reporter
from dist_lm.rlhf.state import RlhfState
from dist_lm.training.checkpoint_saver import CheckpointSaver
from dist_lm.training.heartbeat import Phase


@dataclass(frozen=True)
class Saving:
    """Called with the state after an iteration, on every rank (collective)."""

    saver: CheckpointSaver
    begun: Begun
    reporter: Reporter
    is_first: bool

    def __call__(self, state: RlhfState) -> None:
        """Save it, with the models as they are now."""
        self.reporter.alive(Phase.SAVING)
        began = time.perf_counter()
        policy = self.begun.models.policy
        self.saver.save(
            policy.model,
            policy.optimizer,
            train_state(state, self.reporter.tokens),
            self.begun.companions,
            saved_files(state) if self.is_first else {},
        )
        if self.reporter.metrics:
            self.reporter.metrics.write(state.iteration, {"checkpoint/stall_s": time.perf_counter() - began})
