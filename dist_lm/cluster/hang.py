"""Whether a gang has stopped getting on, and who is to blame: a function of what its ranks were last heard doing."""

from collections.abc import Sequence
from dataclasses import dataclass

from dist_lm.cluster.heartbeat import Pulse
from dist_lm.training.heartbeat import Phase


@dataclass(frozen=True)
class Patience:
    """How long no rank may be heard of before the gang counts as hung."""

    steps: float  # while training: so many times the median step,
    least_s: float  # but no less than this
    otherwise_s: float  # in everything else, and in the first step (it may compile)

    def limit_s(self, pulse: Pulse) -> float:
        """For a gang whose last sign of life is `pulse`, in seconds."""
        if pulse.phase in (Phase.DATA, Phase.STEP) and pulse.median_step_s > 0:
            return max(self.least_s, self.steps * pulse.median_step_s)
        return self.otherwise_s


@dataclass(frozen=True)
class Hang:
    """A gang that does not get on."""

    rank: int | None  # the one that holds the others up, where it can be told
    message: str


def find_hang(pulses: Sequence[Pulse], patience: Patience) -> Hang | None:
    """The hang that `pulses` of all ranks show, if they do.

    Ranks move in step, so one that stands still stops all of them: the last sign of life of any rank counts. The one to
    blame is a stopped process, else one that is behind all the others.
    """
    if not pulses:
        return None
    last = min(pulses, key=lambda pulse: pulse.age_s)
    limit = patience.limit_s(last)
    if last.age_s <= limit:
        return None
    usual = f", a step takes {last.median_step_s:.2g} s" if last.median_step_s else ""
    text = f"no sign of life of any rank for {last.age_s:.0f} s (limit {limit:.0f} s{usual})"
    blamed = _held_up_by(pulses)
    if blamed is None:
        return Hang(None, f"{text}; all are {last.phase.words} at step {last.step}")
    how = " and its process is stopped" if blamed.state == "T" else ""
    return Hang(blamed.rank, f"{text}; it is {blamed.phase.words} at step {blamed.step}{how}, others wait for it")


def _held_up_by(pulses: Sequence[Pulse]) -> Pulse | None:
    stopped = [pulse for pulse in pulses if pulse.state == "T"]
    if stopped:
        return stopped[0]
    behind = min((pulse.step, pulse.phase) for pulse in pulses)
    last = [pulse for pulse in pulses if (pulse.step, pulse.phase) == behind]
    return last[0] if len(last) < len(pulses) and len(last) <= max(1, len(pulses) // 2) else None
