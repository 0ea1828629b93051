"""The training data of runs: shares of corpora and languages, counts, the tokenizer. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_lm.data.manifest import Counts, Manifest
from dist_lm.report.facts import RunFacts, Share, WorkFacts
from dist_lm.tracking.readable import gib, percent, readable_count

COLOURS = 8


@dataclass(frozen=True)
class Mixture:
    """The training data of one run."""

    label: str
    shares: tuple[Share, ...]


def mixtures(runs: Sequence[RunFacts], works: Sequence[WorkFacts]) -> list[Mixture]:
    """A bar for each run whose corpora exist: its languages, weighted by the share of their corpus."""
    work_of = {work.path: work for work in works}
    colours: dict[str, int] = {}
    found = []
    for run in runs:
        work = work_of.get(run.path.parents[2])
        stage = run.config.get("stage", {})
        if not work or stage.get("corpus") not in work.corpora:
            continue
        mix = {str(name): float(share) for name, share in (stage.get("mix") or {}).items()}
        corpora = {stage["corpus"]: 1 - sum(mix.values())} | mix
        parts = [part for name, share in corpora.items() for part in _parts(name, share, work.corpora.get(name))]
        found.append(Mixture(run.label, tuple(_bar(_merged(parts), colours))))
    return found


def corpus_rows(work: WorkFacts) -> list[dict[str, str]]:
    """The languages of every corpus, the largest first, by column."""
    rows = []
    for name, manifest in work.corpora.items():
        train = manifest.splits.get("train")
        held_out = manifest.splits.get("val")
        languages: Mapping[str, Counts] = train.languages if train else {}
        for language, counts in sorted(languages.items(), key=lambda pair: -pair[1].tokens):
            val = held_out.languages.get(language, Counts()) if held_out else Counts()
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
    """The tokenizer in one line; empty without a report."""
    if not report:
        return ""
    by = ", ".join(f"{name} {facts['bytes_per_token']:.2f}" for name, facts in report.get("languages", {}).items())
    return f"{report['vocab_size']:,} pieces, {report['bytes_per_token']:.2f} bytes a token{f' ({by})' if by else ''}"


def _parts(name: str, share: float, manifest: Manifest | None) -> list[tuple[str, float, str]]:
    """(language, share, words) of one corpus; a language's share is that of its tokens, which are sampled evenly."""
    train = manifest.splits.get("train") if manifest else None
    total = train.counts.tokens if train else 0
    if not train or not total:
        return [(name, share, f"corpus {name}")]
    return [
        (language, share * counts.tokens / total, f"corpus {name}, {readable_count(counts.tokens)} tokens")
        for language, counts in sorted(train.languages.items(), key=lambda pair: -pair[1].tokens)
    ]


def _merged(parts: Sequence[tuple[str, float, str]]) -> list[tuple[str, float, str]]:
    """The parts with equal languages of several corpora joined."""
    together: dict[str, tuple[float, list[str]]] = {}
    for label, share, words in parts:
        before, said = together.get(label, (0.0, []))
        together[label] = (before + share, [*said, words])
    return [(label, share, "; ".join(said)) for label, (share, said) in together.items()]


def _bar(parts: Sequence[tuple[str, float, str]], colours: dict[str, int]) -> list[Share]:
    """A colour for each language, the same in all bars if possible; beyond `COLOURS` the smallest parts share one."""
    named, others = _few(parts)
    free = set(range(COLOURS - bool(others)))
    chosen: dict[str, int] = {}
    for label, _, _ in sorted(named, key=lambda part: part[0] not in colours):
        known = colours.get(label, -1)
        chosen[label] = known if known in free else min(free, key=lambda one: (one in colours.values(), one))
        free.remove(chosen[label])
        colours.setdefault(label, chosen[label])
    shares, start = [], 0.0
    for label, share, words in [*named, *others]:
        said = f"{label}: {percent(share)} of a step ({words})"
        shares.append(Share(label, percent(share), start, share * 100, chosen.get(label, COLOURS - 1), said))
        start += share * 100
    return shares


def _few(
    parts: Sequence[tuple[str, float, str]],
) -> tuple[Sequence[tuple[str, float, str]], list[tuple[str, float, str]]]:
    """The parts with a colour of their own, and the remaining small ones joined to one."""
    if len(parts) <= COLOURS:
        return parts, []
    small = sorted(parts, key=lambda part: -part[1])[COLOURS - 1 :]
    words = ", ".join(f"{label} {percent(share)}" for label, share, _ in small)
    together = (f"{len(small)} others", sum(share for _, share, _ in small), words)
    return [part for part in parts if part not in small], [together]
