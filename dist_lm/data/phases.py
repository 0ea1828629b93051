"""The mix of a run with phases: which corpus each sequence is of, as a pure function of its number.

`stage.phases` becomes whole numbers of sequences by corpus and phase (`mix_phases`), so every border is exact. Inside a
phase the corpora alternate as evenly as whole sequences can (`Interleaving`), and each is read in its own order, from
where the phase before has left it. A mix holds some numbers for each corpus and phase, whatever the number of ranks,
documents or steps; a look-up takes a search of the phase and a walk down a tree of the corpora, in either direction.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

from dist_lm.config.phases import epochs_in, phase_ends, weights_of
from dist_lm.config.stage import StageConfig
from dist_lm.errors import ConfigError, require


@dataclass(frozen=True)
class MixPhase:
    """A phase of a run in numbers."""

    begin: int  # steps before it
    until: int  # its last step
    sequences: Mapping[str, int]  # corpus -> sequences, the stage's own first; 0 for those that it does not read

    def name(self, number: int) -> str:
        """Returns the phase for a message: `phase 2 (steps 801 to 1,000)`.

        Args:
            number: of the phase, from 1.
        """
        return f"phase {number} (steps {self.begin + 1:,} to {self.until:,})"

    def record(self) -> dict[str, Any]:
        """Returns the phase as a checkpoint holds it (`TrainState.phases`)."""
        return {"until": self.until, "sequences": {name: count for name, count in self.sequences.items() if count}}


class Interleaving:
    """An order of several corpora with a whole number of sequences each, computed for any position.

    The corpora that are read are the leaves of a balanced tree; others do not change the order. A node with n
    sequences, m of them in its left half, gives position p to the left where floor((p + 1) m / n) exceeds
    floor(p m / n), which spreads them as evenly as a line is drawn on a screen (Bresenham 1965). So after any number of
    sequences a corpus is off its share by less than the depth of the tree, and after all n by nothing. Positions from n
    on repeat the order.
    """

    def __init__(self, n_sequences: Sequence[int]) -> None:
        """`n_sequences`: of each corpus; 0 for one that is not read, but not all."""
        assert sum(n_sequences) > 0, n_sequences
        assert min(n_sequences) >= 0, n_sequences
        self._corpora = [corpus for corpus, n in enumerate(n_sequences) if n]
        self._leaf_of = {corpus: leaf for leaf, corpus in enumerate(self._corpora)}
        self._sums = [0, *accumulate(n_sequences[corpus] for corpus in self._corpora)]

    def locate(self, position: int) -> tuple[int, int]:
        """Returns (corpus, number within it) of the sequence at `position`."""
        begin, end = 0, len(self._corpora)
        while end - begin > 1:
            middle = (begin + end) // 2
            n, n_left = self._count(begin, end), self._count(begin, middle)

            left_before = position * n_left // n
            if (position + 1) * n_left // n > left_before:
                position, end = left_before, middle
            else:
                position, begin = position - left_before, middle
        return self._corpora[begin], position

    def position(self, corpus: int, number: int) -> int:
        """Returns the position of a sequence of a corpus: the inverse of `locate`."""
        for n, n_left, is_left in reversed(self._path(corpus)):
            if is_left:
                # The first position p at which (p + 1) n_left / n reaches number + 1, as `locate` counts.
                number = -(-(number + 1) * n // n_left) - 1
            else:
                number = number * n // (n - n_left)
        return number

    def count(self, corpus: int, end: int) -> int:
        """Returns how many of the sequences at positions below `end` are of a corpus."""
        if corpus not in self._leaf_of:
            return 0
        for n, n_left, is_left in self._path(corpus):
            left = end * n_left // n
            end = left if is_left else end - left
        return end

    def _path(self, corpus: int) -> list[tuple[int, int, bool]]:
        """Returns the way from the root to a corpus: sequences of each node, those of its left half, and whether the
        corpus is there."""
        leaf = self._leaf_of[corpus]
        begin, end = 0, len(self._corpora)
        path = []
        while end - begin > 1:
            middle = (begin + end) // 2
            is_left = leaf < middle
            path.append((self._count(begin, end), self._count(begin, middle), is_left))
            begin, end = (begin, middle) if is_left else (middle, end)
        return path

    def _count(self, begin: int, end: int) -> int:
        return self._sums[end] - self._sums[begin]


class PhasedMix:
    """Mixes sequences of several corpora into one stream, phase by phase; beyond its end the last one goes on."""

    def __init__(self, sequences_of_phases: Sequence[Sequence[int]]) -> None:
        """`sequences_of_phases`: (phases, corpora); the sequences that each phase takes of each corpus."""
        self._orders = [Interleaving(counts) for counts in sequences_of_phases]
        lengths = [sum(counts) for counts in sequences_of_phases]
        self._begins = list(accumulate(lengths[:-1], initial=0))  # (phases,) sequences before each
        # (corpora, phases) sequences of each corpus before each phase
        self._begins_of_corpora = [
            list(accumulate(counts[:-1], initial=0)) for counts in zip(*sequences_of_phases, strict=True)
        ]

    def locate(self, number: int) -> tuple[int, int]:
        """Returns (corpus, number within it) of global sequence `number`.

        Every corpus is read in its own order, without a gap.
        """
        phase = bisect_right(self._begins, number) - 1
        corpus, number_in_phase = self._orders[phase].locate(number - self._begins[phase])
        return corpus, self._begins_of_corpora[corpus][phase] + number_in_phase

    def number(self, corpus: int, number: int) -> int:
        """Returns the global number of a sequence of a corpus, one that is read: the inverse of `locate`."""
        begins = self._begins_of_corpora[corpus]
        # Phases that begin alike read nothing of the corpus, but for the last one of them.
        phase = bisect_right(begins, number) - 1
        return self._begins[phase] + self._orders[phase].position(corpus, number - begins[phase])

    def count(self, corpus: int, end: int) -> int:
        """Returns how many of the global sequences below `end` are of a corpus."""
        phase = bisect_right(self._begins, end) - 1
        in_phase = self._orders[phase].count(corpus, end - self._begins[phase])
        return self._begins_of_corpora[corpus][phase] + in_phase


# --- from the configuration to numbers ---


def mix_phases(stage: StageConfig, n_sequences: Mapping[str, int]) -> tuple[MixPhase, ...]:
    """Returns the phases of a stage in numbers.

    Passes are rounded to whole sequences; weights divide the remaining ones by the largest remainder.

    Args:
        n_sequences: sequences in an epoch of each corpus, that of the stage first.

    Raises:
        ConfigError: the passes of a phase leave nothing for the weights, a weight gives no sequence, or a corpus would
            be read more often than stage.max_epochs allows; names the phase, the corpus and the numbers.
    """
    ends = phase_ends(stage.phases, stage.steps)
    begins = [0, *ends[:-1]]
    phases = [
        _mix_phase(stage, i, begin, end, n_sequences) for i, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]
    _check_epochs(phases, n_sequences, stage.max_epochs)
    return tuple(phases)


def require_same_past(
    run: object, recorded: Sequence[Mapping[str, Any]], phases: Sequence[Mapping[str, Any]], step: int
) -> None:
    """Refuses phases that would change the steps that a run has taken.

    A phase that has begun stays whole: its end and its numbers of sequences decide the order of its first steps too.

    Args:
        run: what is continued, for the message.
        recorded: phases that the run has had (`MixPhase.record`).
        phases: phases that it would have, in the same form.
        step: steps that it has taken.

    Raises:
        ConfigError: names the first phase that would change, how, and the way out.
    """
    if phases and not recorded and step:
        raise ConfigError(
            f"{run} has taken {step:,} steps without stage.phases: leave them out, or choose another run_id"
        )

    begin, change = 0, ""
    for i, before in enumerate(recorded):
        if begin >= step or change:
            break

        name = f"phase {i + 1} (steps {begin + 1:,} to {before['until']:,}), which has begun,"
        if i >= len(phases):
            change = f"{name} would be left out"
        elif phases[i]["until"] != before["until"]:
            change = f"{name} would end at step {phases[i]['until']:,}"
        elif phases[i]["sequences"] != before["sequences"]:
            now = _counted(phases[i]["sequences"])
            change = f"{name} would have {now} in place of {_counted(before['sequences'])}"
        begin = before["until"]

    if change:
        raise ConfigError(
            f"{run} is at step {step:,} and cannot go on with these stage.phases: {change}. A phase that has begun "
            "keeps its mix and its end; give it `until: STEP` and change or add phases behind it, or choose another "
            "run_id"
        )


def _counted(sequences: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} sequences of {name}" for name, count in sequences.items())


def mix_of(phases: Sequence[MixPhase]) -> PhasedMix:
    """Returns the order of the corpora over phases; corpora have the numbers of their places in `MixPhase.sequences`.

    The order is a function of these numbers alone, so no seed, layout or size of a corpus changes it.
    """
    return PhasedMix([list(phase.sequences.values()) for phase in phases])


def _mix_phase(stage: StageConfig, i: int, begin: int, end: int, n_sequences: Mapping[str, int]) -> MixPhase:
    mix, key = stage.phases[i].mix, f"stage.phases[{i}].mix"
    total = (end - begin) * stage.global_batch

    by_epochs = {name: round(epochs * n_sequences[name]) for name, epochs in epochs_in(mix).items()}
    left = total - sum(by_epochs.values())
    if left < 0:
        passes = ", ".join(f"{mix[name]} of {name} are {count:,}" for name, count in by_epochs.items())
        raise ConfigError(
            f"{key}: phase {i + 1} (steps {begin + 1:,} to {end:,}) has {total:,} sequences, but {passes}: "
            "give fewer epochs, or more steps"
        )

    by_weights = largest_remainder(left, weights_of(mix))
    sequences = {name: by_epochs.get(name, by_weights.get(name, 0)) for name in n_sequences}
    for name in mix:
        accepted = f"at least one of the {total:,} sequences of phase {i + 1} (steps {begin + 1:,} to {end:,})"
        require(sequences[name] > 0, f"{key}.{name}", mix[name], accepted)
    return MixPhase(begin, end, sequences)


def largest_remainder(total: int, weights: Mapping[str, Fraction]) -> dict[str, int]:
    """Returns whole parts of `total` in proportion to positive weights, each less than 1 off its exact part (Hamilton's
    method). Of equal remainders the first one is rounded up."""
    weight_of_all = sum(weights.values())
    exact_parts = {name: total * weight / weight_of_all for name, weight in weights.items()}
    parts = {name: int(part) for name, part in exact_parts.items()}

    by_remainder = sorted(parts, key=lambda name: parts[name] - exact_parts[name])
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def _check_epochs(phases: Sequence[MixPhase], n_sequences: Mapping[str, int], max_epochs: Mapping[str, float]) -> None:
    """Refuses phases that read a corpus more often than allowed.

    Raises:
        ConfigError: names the first such phase, the corpus, and the numbers.
    """
    for name, most in max_epochs.items():
        # The decimal as it was written: a float lies beside it, and may round to a sequence less.
        allowed = int(Fraction(str(most)) * n_sequences[name])
        before = 0
        for number, phase in enumerate(phases, 1):
            sequences = phase.sequences[name]
            if before + sequences > allowed:
                raise ConfigError(
                    f"stage.max_epochs.{name}={most:g}: {phase.name(number)} takes {sequences:,} sequences of {name}, "
                    f"but {allowed - before:,} are left: an epoch has {n_sequences[name]:,}, and {before:,} are read "
                    f"before. Give {name} less in this phase, or allow more epochs"
                )
            before += sequences
