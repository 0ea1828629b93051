"""Phases: exact numbers of sequences at every border, an order that a position alone decides, and what is refused."""

import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.config.phases import PhaseConfig
from dist_lm.config.stage import StageConfig
from dist_lm.data.epochs import phased_passes
from dist_lm.data.phases import (
    Interleaving,
    MixPhase,
    PhasedMix,
    largest_remainder,
    mix_of,
    mix_phases,
    require_same_past,
)
from dist_lm.data.sequences import Mix, MixedSequences, PhasedCorpora
from dist_lm.data.stream import SequenceStream
from dist_lm.errors import ConfigError
from dist_lm.training.optimizer import stage_rate
from tests.data.synthetic_corpus import corpus, lengths

EPOCH = {"code": 500, "chat": 40, "prose": 300}  # sequences in an epoch of each corpus
COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any)


def stage_of(phases: list[dict[str, Any]], **keys: Any) -> StageConfig:
    fields = {"name": "code", "corpus": "code", "steps": 100, "global_batch": 8, "warmup_steps": 10} | keys
    return StageConfig(**fields, phases=[PhaseConfig(**phase) for phase in phases])


def random_phases(seed: int) -> tuple[StageConfig, tuple[MixPhase, ...]]:
    """Three phases of weights, and in every second mix also of passes."""
    rng = random.Random(seed)
    phases: list[dict[str, Any]] = []
    for until in (rng.randrange(10, 40), rng.choice([0.5, 0.77]), None):
        names = rng.sample(["code", "chat", "prose"], rng.randint(1, 3))
        mix: dict[str, Any] = {name: rng.choice([rng.randint(1, 9), round(rng.random() + 0.01, 3)]) for name in names}
        if seed % 2 and len(mix) > 1:
            mix[names[0]] = "0.25 epochs"
        phases.append({"until": until, "mix": mix})
    phases[0]["mix"]["code"] = 1
    stage = stage_of(phases)
    return stage, mix_phases(stage, EPOCH)


@pytest.mark.parametrize("seed", range(10))
def test_random_mixes_are_exact_at_every_border(seed: int):
    """Finds a phase that ends with a sequence more or less of a corpus than planned, and shares that are not those
    that the weights ask for."""
    stage, phases = random_phases(seed)
    mix = mix_of(phases)
    number = 0
    for phase, config in zip(phases, stage.phases, strict=True):
        end = phase.until * stage.global_batch
        read = Counter(mix.locate(n)[0] for n in range(number, end))
        assert [read[place] for place in range(len(EPOCH))] == list(phase.sequences.values())

        by_epochs = {name: round(EPOCH[name] / 4) for name, amount in config.mix.items() if isinstance(amount, str)}
        assert {name: phase.sequences[name] for name in by_epochs} == by_epochs
        weights = {name: amount for name, amount in config.mix.items() if not isinstance(amount, str)}
        left = end - number - sum(by_epochs.values())
        for name, weight in weights.items():
            assert abs(phase.sequences[name] - left * weight / sum(weights.values())) < 1, name
        number = end


@pytest.mark.parametrize("seed", range(10))
def test_the_order_is_inverted_and_each_corpus_is_read_without_a_gap(seed: int):
    """Finds a sequence that is read twice or never, `data where` that names another step, and counts of a metric that
    are not those of the stream; also behind the last step, where the stream reads ahead."""
    stage, phases = random_phases(seed)
    mix = mix_of(phases)
    read = Counter[int]()
    for number in range(stage.steps * stage.global_batch + 50):
        corpus_place, in_corpus = mix.locate(number)
        assert in_corpus == read[corpus_place]
        assert mix.number(corpus_place, in_corpus) == number
        if number % 7 == 0:
            assert [mix.count(place, number) for place in range(len(EPOCH))] == [read[p] for p in range(len(EPOCH))]
        read[corpus_place] += 1


@given(COUNTS, st.integers(0, 10**12))
def test_any_position_is_found_alone_and_inverted(counts: list[int], position: int):
    """Finds rounding of large numbers, and an order that depends on what was asked before."""
    order = Interleaving(counts)
    corpus_place, number = order.locate(position)
    assert order.position(corpus_place, number) == position
    assert order.count(corpus_place, position + 1) == number + 1
    assert Interleaving(counts).locate(position) == (corpus_place, number)


@given(COUNTS)
def test_corpora_alternate_evenly(counts: list[int]):
    """Finds a corpus that comes in runs, whose steps would have another mix than the phase."""
    order, total = Interleaving(counts), sum(counts)
    depth = max(1, (sum(n > 0 for n in counts) - 1).bit_length())
    for end in range(total + 1):
        for place, count in enumerate(counts):
            assert abs(order.count(place, end) - end * count / total) < depth


def test_a_corpus_of_a_later_phase_does_not_change_earlier_ones():
    """Finds a run that cannot take up a new corpus, because its past would have another order."""
    before = PhasedMix([[30, 10, 7]])
    after = PhasedMix([[30, 0, 10, 7], [5, 5, 5, 5]])
    places = {0: 0, 1: 2, 2: 3}
    assert [after.locate(n) for n in range(47)] == [(places[p], i) for p, i in map(before.locate, range(47))]


def test_remainders_are_divided_to_the_last_sequence():
    assert largest_remainder(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}  # pyright: ignore
    weights = stage_of([{"mix": {"code": 0.7, "chat": 0.2, "prose": 0.1}}])
    (phase,) = mix_phases(weights, EPOCH)
    assert phase.sequences == {"code": 560, "chat": 160, "prose": 80}  # 0.7 is seven tenths, not its nearest float


# --- the stream ---


def test_steps_are_the_same_at_any_layout_and_after_a_resume(tmp_path: Path):
    """Finds an order that depends on ranks, micro-batches or what was read before."""
    own, other = (corpus(tmp_path / name, lengths(40, 50, seed), name == "b") for seed, name in enumerate("ab"))
    stage = stage_of([{"until": 3, "mix": {"code": 2, "chat": 1}}, {"mix": {"code": 1, "chat": "1 epoch"}}], steps=20)

    def mix(n_sequences: Any) -> PhasedMix:
        return mix_of(mix_phases(stage, dict(zip(stage.corpus_names, n_sequences, strict=True))))

    def rows(steps: int, position: int, dp_size: int, micro_batch: int) -> list[torch.Tensor]:
        tokens: list[list[torch.Tensor]] = [[] for _ in range(steps)]
        for dp_rank in range(dp_size):
            layout: dict[str, Any] = {
                "dp_rank": dp_rank,
                "dp_size": dp_size,
                "micro_batch": micro_batch,
                "position": position,
            }
            options: dict[str, Any] = {"seed": 3, "seq_len": 16, "global_batch": 8, "mix": PhasedCorpora([other], mix)}
            with SequenceStream(own, **options, **layout) as stream:
                for of_step in tokens:
                    of_step += [batch.tokens_BT for batch in next(stream).micro_batches]
        return [torch.cat(of_step) for of_step in tokens]

    whole = rows(6, 0, dp_size=1, micro_batch=8)
    parts = rows(2, 0, dp_size=2, micro_batch=3) + rows(4, 16, dp_size=4, micro_batch=1)
    assert all(torch.equal(before, after) for before, after in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    ("shares", "seed", "digest"),
    [
        ([0.07, 0.03], 0, "d12c79f7e747625e"),
        ([0.2, 0.3], 7, "82f0255911840fc2"),
        ([0.15], 2**31, "391d2722cc5159f3"),
    ],
)
def test_stage_mix_keeps_the_order_of_earlier_releases(shares: list[float], seed: int, digest: str):
    """Finds a run with stage.mix that goes on with other sequences than it would have read."""
    mix = Mix(shares, seed)
    places = [mix.locate(number) for number in range(1000)]
    assert hashlib.sha256(repr(places).encode()).hexdigest()[:16] == digest


def test_stage_mix_keeps_the_documents_of_earlier_releases(tmp_path: Path):
    """Finds the same, where the corpora of a mix are opened."""
    own, *others = (corpus(tmp_path / name, lengths(40, 50, i), name == "c") for i, name in enumerate("abc"))
    sequences = MixedSequences(own, seed=3, seq_len=16, mix=dict(zip(others, (0.25, 0.1), strict=True)))
    read = [sequences.slices(number) for number in range(400)]
    words = repr([(part_of.directory.name, [tuple(part) for part in parts]) for part_of, parts in read])
    assert hashlib.sha256(words.encode()).hexdigest()[:16] == "6f48b4effb690fd2"


# --- passes, rates, and what is refused ---


def test_passes_follow_the_phases():
    """Finds epochs in metrics and plan that count the mean share of the run, not what was read."""
    phases = mix_phases(stage_of([{"until": 50, "mix": {"code": 1}}, {"mix": {"code": 1, "chat": "2 epochs"}}]), EPOCH)
    code, chat, prose = phased_passes(phases, EPOCH)
    assert (code.epochs(400), chat.epochs(400)) == (400 / 500, 0.0)
    assert (code.epochs(800), chat.epochs(800), prose.epochs(800)) == ((800 - 80) / 500, 2.0, 0.0)
    assert chat.share == 80 / 800


def test_the_rate_of_a_phase_is_that_of_the_schedule_times_its_factor():
    """Finds a factor that begins a step early or late, and a run without phases that has other rates."""
    plain = stage_of([])
    phased = stage_of([{"until": 40, "mix": {"code": 1}}, {"mix": {"code": 1}, "lr": 0.1}])
    rates, factors = [[stage_rate(stage, step) for step in range(100)] for stage in (plain, phased)]
    assert factors[:40] == rates[:40]
    assert factors[40:] == [rate * 0.1 for rate in rates[40:]]


@pytest.mark.parametrize(
    ("phases", "keys", "said"),
    [
        ([{"mix": {"chat": 1}}], {}, "expected stage.corpus=code in at least one phase"),
        ([{"mix": {}}, {"mix": {"code": 1}}], {}, r"phases\[0\].until=None: expected a step"),
        ([{"mix": {"code": "1 epoch"}}], {}, r"phases\[0\].mix={'code': '1 epoch'}: expected at least one .* weight"),
        ([{"mix": {"code": 0}}], {}, r"phases\[0\].mix.code=0: expected a positive weight"),
        ([{"mix": {"code": 1, "chat": "2 passes"}}], {}, r"mix.chat=2 passes: expected a positive weight .*2 epochs"),
        ([{"mix": {"code": 1}, "lr": 0.0}], {}, r"phases\[0\].lr=0.0: expected a positive factor"),
        ([{"until": 50, "mix": {"code": 1}}], {}, r"phases\[0\].until=50: expected none: the last phase goes on"),
        ([{"until": 100, "mix": {"code": 1}}, {"mix": {"code": 1}}], {}, r"until=100: .* before stage.steps=100"),
        ([{"until": 1.0, "mix": {"code": 1}}, {"mix": {"code": 1}}], {}, r"until=1.0: expected a step \(800\), or a"),
        (
            [{"until": 50, "mix": {"code": 1}}, {"until": 0.4, "mix": {"code": 1}}, {"mix": {"code": 1}}],
            {},
            r"phases\[1\].until=0.4: expected a step after 50",
        ),
        ([{"mix": {"code": 1}}], {"mix": {"chat": 0.1}}, "stage.mix={'chat': 0.1}: expected null with stage.phases"),
        ([{"mix": {"code": 1}}], {"epochs": 2.0}, "stage.epochs=2.0: expected stage.steps with stage.phases"),
        ([{"mix": {"code": 1}}], {"max_epochs": {"chat": 1.0}}, "max_epochs=chat: expected corpora of .*: code"),
        ([], {"max_epochs": {"code": 1.0}}, "max_epochs=code: expected corpora of stage.phases: there are no phases"),
    ],
)
def test_phases_that_no_run_can_have_are_refused_by_name(phases: list, keys: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        stage_of(phases, **keys)


@pytest.mark.parametrize(
    ("phases", "keys", "said"),
    [
        (
            [{"until": 50, "mix": {"code": 1}}, {"mix": {"code": 1, "chat": "11 epochs"}}],
            {},
            r"phases\[1\].mix: phase 2 \(steps 51 to 100\) has 400 sequences, but 11 epochs of chat are 440",
        ),
        (
            [{"mix": {"code": 1, "chat": "20 epochs"}}],
            {},
            r"mix.code=1: expected at least one of the 800 sequences of phase 1 \(steps 1 to 100\)",
        ),
        (
            [{"until": 50, "mix": {"code": 1, "chat": 0.1}}, {"mix": {"code": 1, "chat": 0.1}}],
            {"max_epochs": {"chat": 1.5}},
            r"max_epochs.chat=1.5: phase 2 \(steps 51 to 100\) takes 36 sequences of chat, but 24 are left: an epoch "
            "has 40, and 36 are read before",
        ),
    ],
)
def test_a_phase_that_a_corpus_cannot_fill_names_both_and_the_numbers(phases: list, keys: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        mix_phases(stage_of(phases, **keys), EPOCH)


@pytest.mark.parametrize(
    ("phases", "step", "said"),
    [
        ([(50, {"code": 400}), (100, {"code": 300, "chat": 100})], 50, ""),
        ([(50, {"code": 400}), (80, {"chat": 240})], 50, ""),
        ([(50, {"code": 400}), (80, {"chat": 240})], 51, r"phase 2 \(steps 51 to 100\).* would end at step 80"),
        (
            [(50, {"code": 399, "chat": 1}), (100, {"code": 400})],
            10,
            "would have 399 .*, 1 .* in place of 400 sequences",
        ),
        ([], 10, r"phase 1 \(steps 1 to 50\), which has begun, would be left out"),
    ],
)
def test_a_phase_that_has_begun_stays(phases: list, step: int, said: str):
    """Finds a run whose first steps no longer are those that its configuration says, and a later phase that is taken
    for begun."""
    recorded = [{"until": 50, "sequences": {"code": 400}}, {"until": 100, "sequences": {"code": 400}}]
    now = [{"until": until, "sequences": sequences} for until, sequences in phases]
    if not said:
        require_same_past("run", recorded, now, step)
        return
    with pytest.raises(ConfigError, match=said):
        require_same_past("run", recorded, now, step)


def test_a_run_without_phases_gets_none_later():
    with pytest.raises(ConfigError, match=r"run has taken 10 steps without stage\.phases: leave them out"):
        require_same_past("run", [], [{"until": 100, "sequences": {"code": 800}}], 10)
    require_same_past("run", [], [], 10)
