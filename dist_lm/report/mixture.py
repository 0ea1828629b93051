"""The training data of runs: shares of corpora and languages, counts, the tokenizer. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_lm.config.phases import PhaseConfig, epochs_in, phase_ends, phased_corpora, weights_of
from dist_lm.data.manifest import Counts, Manifest, Split
from dist_lm.report.facts import RunFacts, Share, WorkFacts
from dist_lm.tracking.readable import gib, percent, readable_count

COLOURS = 8


@dataclass(frozen=True)
class Mixture:
    """The training data of one run."""

    label: str
    shares: tuple[Share, ...]


def mixtures(runs: Sequence[RunFacts], works: Sequence[WorkFacts]) -> list[Mixture]:
    """Returns a bar for each run whose own corpus is in `works`: its languages, weighted by the share of their corpus
    in the whole run. A corpus of its mix that is not there is one part; other runs have no bar."""
    work_of = {work.path: work for work in works}
    colours: dict[str, int] = {}  # language -> colour, the same in all bars
    bars = []
    for run in runs:
        work = work_of.get(run.path.parents[2])
        stage = run.config.get("stage", {})

        if not work:
            continue
        if run.folders.get(stage.get("corpus", ""), stage.get("corpus")) not in work.corpora:
            continue

        names = {stage["corpus"], *(stage.get("mix") or {}), *phased_corpora(stage.get("phases") or ())}
        manifests = {name: work.corpora.get(run.folders.get(name, name)) for name in names}
        corpora = _shares(stage, manifests)
        parts = [part for name, share in corpora.items() for part in _parts(name, share, manifests[name])]
        bars.append(Mixture(run.label, tuple(_bar(_merged(parts), colours))))

    return bars


def corpus_rows(work: WorkFacts) -> list[dict[str, str]]:
    """Returns a row for each language of every corpus as column -> text, corpus by corpus, in each the language with
    most train tokens first; columns of counts are of train, the last one of val."""
    rows = []
    for name, manifest in work.corpora.items():
        train = manifest.splits.get("train", Split())
        held_out = manifest.splits.get("val", Split())

        for language, counts in sorted(train.languages.items(), key=lambda pair: -pair[1].tokens):
            val = held_out.languages.get(language, Counts())
            rows.append(
                {
                    "Corpus": name,
                    "Language": language,
                    "Documents": f"{counts.documents:,}",
                    "Tokens": readable_count(counts.tokens),
                    "Text": gib(counts.bytes),
                    "Bytes a token": f"{counts.bytes / counts.tokens:.2f}" if counts.tokens else "",
                    "Documents held out": f"{val.documents:,}",
                }
            )
    return rows


def tokenizer_words(report: Mapping[str, Any]) -> str:
    """Returns the tokenizer in one line; an empty text without a report."""
    if not report:
        return ""
    by_language = ", ".join(
        f"{name} {facts['bytes_per_token']:.2f}" for name, facts in report.get("languages", {}).items()
    )
    total = f"{report['vocab_size']:,} pieces, {report['bytes_per_token']:.2f} bytes a token"
    return f"{total} ({by_language})" if by_language else total


def _shares(stage: Mapping[str, Any], manifests: Mapping[str, Manifest | None]) -> dict[str, float]:
    """Returns the share of the sequences of a run that each corpus gives, its own first.

    Passes of a phase count by the train tokens of their corpus, and by nothing where it is not there.
    """
    if not stage.get("phases"):
        # The run's own corpus gets what the mix leaves.
        mix = {str(name): float(share) for name, share in (stage.get("mix") or {}).items()}
        return {stage["corpus"]: 1 - sum(mix.values())} | mix

    phases = [PhaseConfig(**phase) for phase in stage["phases"]]
    ends = phase_ends(phases, stage["steps"])
    step_tokens = stage["global_batch"] * stage["seq_len"]

    tokens: dict[str, float] = {stage["corpus"]: 0.0}
    for phase, begin, end in zip(phases, [0, *ends], ends, strict=False):
        amounts = {}
        for name, epochs in epochs_in(phase.mix).items():
            manifest = manifests[name]
            amounts[name] = float(epochs) * manifest.splits["train"].counts.tokens if manifest else 0.0

        weights = weights_of(phase.mix)
        remaining_tokens = (end - begin) * step_tokens - sum(amounts.values())
        amounts |= {name: remaining_tokens * float(weight / sum(weights.values())) for name, weight in weights.items()}
        for name, amount in amounts.items():
            tokens[name] = tokens.get(name, 0.0) + amount
    return {name: amount / (ends[-1] * step_tokens) for name, amount in tokens.items()}


def _parts(name: str, share: float, manifest: Manifest | None) -> list[tuple[str, float, str]]:
    """Returns (language, share, words) for one corpus, largest first; the shares add up to `share` and are those of
    train tokens, which are sampled evenly. A corpus that is not there (None) or has no tokens is one part with its
    name."""
    train = Split()
    if manifest:
        train = manifest.splits.get("train", train)

    # A corpus that is not here, or has no text, is one part.
    total = train.counts.tokens
    if not total:
        return [(name, share, f"corpus {name}")]

    return [
        (language, share * counts.tokens / total, f"corpus {name}, {readable_count(counts.tokens)} tokens")
        for language, counts in sorted(train.languages.items(), key=lambda pair: -pair[1].tokens)
    ]


def _merged(parts: Sequence[tuple[str, float, str]]) -> list[tuple[str, float, str]]:
    """Returns one part for each language, in the order of its first part: shares are added, words joined."""
    by_label: dict[str, tuple[float, list[str]]] = {}
    # The words of all corpora stay, so that a reader sees where a language comes from.
    for label, share, words in parts:
        share_before, words_before = by_label.get(label, (0.0, []))
        by_label[label] = (share_before + share, [*words_before, words])
    return [(label, share, "; ".join(words)) for label, (share, words) in by_label.items()]


def _bar(parts: Sequence[tuple[str, float, str]], colours: dict[str, int]) -> list[Share]:
    """Returns the parts as shares of a bar, one after the other, with colours, the same in all bars if possible; beyond
    `COLOURS` parts the smallest are one. New languages are added to `colours` (language -> colour)."""
    named, remainder = _few(parts)

    free = set(range(COLOURS - bool(remainder)))
    colour_of: dict[str, int] = {}
    # Languages with a colour from earlier bars choose first.
    for label, _, _ in sorted(named, key=lambda part: part[0] not in colours):
        earlier_colour = colours.get(label, -1)
        if earlier_colour in free:
            colour_of[label] = earlier_colour
        else:
            colour_of[label] = min(free, key=lambda colour: (colour in colours.values(), colour))
        free.remove(colour_of[label])
        colours.setdefault(label, colour_of[label])

    shares = []
    start = 0.0
    for label, share, words in [*named, *remainder]:
        explanation = f"{label}: {percent(share)} of a step ({words})"
        shares.append(Share(label, percent(share), start, share * 100, colour_of.get(label, COLOURS - 1), explanation))
        start += share * 100

    return shares


def _few(
    parts: Sequence[tuple[str, float, str]],
) -> tuple[Sequence[tuple[str, float, str]], list[tuple[str, float, str]]]:
    """Returns the parts with a colour of their own, in their order, and the remaining small ones added to one part; the
    second list is empty if all have one."""
    if len(parts) <= COLOURS:
        return parts, []

    # The smallest languages share a colour, since the large ones are what a reader looks for.
    small = sorted(parts, key=lambda part: -part[1])[COLOURS - 1 :]
    words = ", ".join(f"{label} {percent(share)}" for label, share, _ in small)
    remainder = (f"{len(small)} others", sum(share for _, share, _ in small), words)
    return [part for part in parts if part not in small], [remainder]
