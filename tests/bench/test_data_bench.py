"""From generated parquet to shards: everything arrives, and no process holds much. The long form is 2 GB."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.bench.data import CORPUS, ENCODER, MEMORY, Work, cases, cpu_seconds, facts_of_step, no_cleaning
from dist_lm.config.corpus import CleaningConfig
from dist_lm.data.manifest import read_manifest
from dist_lm.document import Document
from dist_lm.storage.process import cores

SAMPLE_BYTES = 40_000_000  # by which the encoder alone is timed, before and after the build


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("n_bytes", "workers"),
    [(1_000_000, 1), pytest.param(2_000_000_000, 0, marks=[pytest.mark.bars, pytest.mark.timeout(7200)])],
)
def test_a_corpus_from_parquet_is_whole_and_no_process_holds_2_gib(tmp_path: Path, n_bytes: int, workers: int) -> None:
    (case, *_) = cases([f"tokenizer.workers={workers}"], quick=True)
    config = replace(case.config, tokenizer=replace(case.config.tokenizer, train_bytes=n_bytes))
    work = Work(tmp_path, config, no_cleaning())
    processes = workers or cores()
    sample = work.documents(min(n_bytes, SAMPLE_BYTES))
    before = encoded(work, sample, processes)
    began = cpu_seconds()
    facts = facts_of_step(work.build, work.n_bytes, processes)
    rate = work.n_bytes / (cpu_seconds() - began) / 1e6
    after = encoded(work, sample, processes)
    ratios = ", ".join(f"{rate / alone:.2f}" for alone in (before, after))
    print(f"{rate:.2f} MB a CPU second; {ENCODER} {before:.2f} before, {after:.2f} after: ratios {ratios}; {facts}")
    assert facts[MEMORY] < 2048
    manifest = read_manifest(work.directory.corpus(CORPUS))
    assert sum(split.counts.bytes for split in manifest.splits.values()) == work.n_bytes
    assert manifest.splits["val"].counts.documents > 0


def encoded(work: Work, sample: Sequence[Document], processes: int) -> float:
    """MB a CPU second of the encoder alone."""
    began = cpu_seconds()
    work.encode(sample, processes)
    return sum(len(document.text) for document in sample) / (cpu_seconds() - began) / 1e6


def test_a_case_has_the_cleaned_build_beside_the_plain_one() -> None:
    (case,) = cases([], quick=True)
    assert [comparison.variant for comparison in case.comparisons[:2]] == list(case.variants)[:2]
    assert no_cleaning() != CleaningConfig()
