"""Texts that are nearly those of earlier ones are found, and no others."""

import io
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_lm.config.corpus import CorpusConfig
from dist_lm.data import near_duplicates as search
from dist_lm.data.ingest import split_documents
from dist_lm.data.near_duplicates import (
    BANDS,
    ROWS,
    band_hashes,
    common_bands,
    jaccard,
    near_duplicates,
    text_windows,
)
from dist_lm.data.screening import IngestReport, source_name
from tests.data.own_readers import read_stories
from tests.data.reading import read_corpus
from tests.data.test_ingest import stories

LEAST = 0.8
CHINESE = "".join(map(chr, range(0x4E00, 0x4F00)))


def words(generator: random.Random, n: int) -> list[str]:
    return [f"w{generator.randrange(4000)}" for _ in range(n)]


def changed(generator: random.Random, text: Sequence[str], n: int) -> list[str]:
    """Returns a text with `n` of its words replaced."""
    copy = list(text)
    for place in generator.sample(range(len(copy)), n):
        copy[place] = f"new{generator.randrange(10**9)}"
    return copy


def windows_by_hand(text: str) -> set[tuple[str, ...]]:
    separate = text.split()
    size = min(5, len(separate))
    return {tuple(separate[i : i + size]) for i in range(len(separate) - size + 1)}


def similarity(left: str, right: str) -> float:
    one, two = windows_by_hand(left), windows_by_hand(right)
    return len(one & two) / len(one | two)


def resembling(texts: Sequence[str], least: float = LEAST) -> dict[int, int]:
    """Returns what is dropped, by number."""
    keyed = [(number.to_bytes(4, "big"), text) for number, text in enumerate(texts)]
    dropped = near_duplicates(lambda: iter(keyed), least)
    return {int.from_bytes(key, "big"): int.from_bytes(kept, "big") for key, kept in dropped.items()}


@pytest.fixture(scope="module")
def planted() -> list[str]:
    """400 texts, and behind them a changed copy of each second one, at similarities from below 0.5 to 1."""
    generator = random.Random(1)
    texts = [words(generator, generator.randrange(20, 300)) for _ in range(400)]
    copies = [changed(generator, text, int(generator.random() * 0.09 * len(text))) for text in texts[::2]]
    return [" ".join(text) for text in (*texts, *copies)]


def test_similar_texts_are_found_and_no_others(planted: list[str]) -> None:
    """Finds bands that miss similar texts, a similarity that is only estimated, and a text that is dropped for one
    that is dropped itself."""
    dropped = resembling(planted)
    for number, kept in dropped.items():
        assert kept < number
        assert kept not in dropped
        assert similarity(planted[number], planted[kept]) >= LEAST
    pairs = {400 + index: similarity(planted[2 * index], planted[400 + index]) for index in range(200)}
    similar = {number for number, share in pairs.items() if share >= LEAST}
    assert 50 < len(similar) < 150
    assert len(similar & dropped.keys()) >= 0.98 * len(similar)


@pytest.mark.heavy
def test_copies_planted_in_real_code_are_found() -> None:
    """Finds a rule that holds for random words alone: real files share headers, imports and forms."""
    generator, texts, n_bytes = random.Random(6), [], 0
    for path in sorted(Path(pytest.__file__).parents[1].rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text.split()) >= 50 and n_bytes < 100_000_000:
            texts.append(text)
            n_bytes += len(text)
    originals = generator.sample(range(len(texts)), len(texts) // 20)
    copies = []
    for number in originals:
        text = texts[number].split(" ")
        copies.append(" ".join(changed(generator, text, int(generator.random() * 0.06 * len(text)))))

    began = time.process_time()
    dropped = resembling([*texts, *copies])
    seconds = time.process_time() - began
    shares = [similarity(texts[number], copy) for number, copy in zip(originals, copies, strict=True)]
    similar = {len(texts) + index for index, share in enumerate(shares) if share >= LEAST}
    recall = len(similar & dropped.keys()) / len(similar)
    wrong = [index for index, share in enumerate(shares) if share < 0.7 and dropped.get(len(texts) + index) == index]
    natural = sum(number < len(texts) for number in dropped)
    print(f"{len(texts):,} files, {n_bytes / 1e6:.0f} MB at {n_bytes / 1e6 / seconds:.1f} MB/s of a core; {natural:,}")
    print(f"files resemble earlier ones; {len(similar)} planted copies at {LEAST} or more, recall {recall:.4f}")
    assert recall >= 0.98
    assert not wrong
    everything = [*texts, *copies]
    for number, kept in generator.sample(sorted(dropped.items()), min(500, len(dropped))):
        assert similarity(everything[number], everything[kept]) >= LEAST


def test_windows_are_those_counted_by_hand(planted: list[str]) -> None:
    """Finds a hash that takes two windows for one, or depends on where they stand."""
    for left, right in zip(planted[:100], planted[100:200], strict=True):
        assert len(text_windows(left)) == len(windows_by_hand(left))
        joined = f"{left} | {right}"
        assert jaccard(text_windows(left), text_windows(joined)) == pytest.approx(similarity(left, joined))


def test_bands_are_shared_as_often_as_the_theory_says() -> None:
    """Finds hash functions that order windows alike: then bands tell less than they should."""
    generator, shared = np.random.default_rng(0), []
    for _ in range(300):
        both, *own = (generator.integers(0, 2**64, n, np.uint64) for n in (60, 20, 20))
        bands = [band_hashes(np.concatenate([both, each])) for each in own]
        shared.append(np.mean(bands[0] == bands[1]))
    expected = 0.6**ROWS
    assert abs(np.mean(shared) - expected) < 4 * (expected / (300 * BANDS)) ** 0.5


def test_common_bands_are_found_in_blocks_and_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds a text that is lost at the border of a block or of a part of the hashes."""
    generator = np.random.default_rng(0)
    bands_TB = generator.integers(0, 2**64, (1000, BANDS), np.uint64)
    expected = np.zeros(1000, np.uint32)
    for left, right in generator.permutation(1000)[:240].reshape(-1, 2):
        band = generator.integers(BANDS)
        bands_TB[right, band] = bands_TB[left, band]
        expected[[left, right]] = 1 << band
    for texts_of_block, texts_of_part in ((1 << 16, 1 << 22), (70, 100), (1000, 50), (999, 640)):
        monkeypatch.setattr(search, "BLOCK", texts_of_block)
        monkeypatch.setattr(search, "PART", texts_of_part)
        assert (common_bands(iter(bands_TB)).bits == expected).all()


def test_chains_of_changed_texts_do_not_drag_each_other_out() -> None:
    """Finds groups that are joined over texts in between: the ends of a chain have little in common."""
    generator = random.Random(2)
    chain = [words(generator, 200)]
    for step in range(6):
        copy = list(chain[-1])
        copy[20 * step : 20 * step + 12] = words(generator, 12)
        chain.append(copy)
    texts = [" ".join(text) for text in chain]
    assert [similarity(texts[0], text) >= LEAST for text in texts[:3]] == [True, True, False]
    dropped = resembling(texts)
    assert dropped[1] == 0
    assert 2 not in dropped


def test_texts_like_sought_ones_are_all_found(planted: list[str]) -> None:
    """Finds one that is missed, a less similar one, and one that is said to resemble another than the nearest."""
    texts = [*planted[:30], *planted[400:415]]
    sought = texts[:30:2]
    found = dict(search.resembling(texts, sought, LEAST))
    assert len(found) > len(sought)
    for number, text in enumerate(texts):
        likeness = [similarity(text, each) for each in sought]
        assert (number in found) == (max(likeness) >= LEAST)
        assert number not in found or likeness[found[number]] == max(likeness)


def test_many_texts_that_are_half_alike_cost_no_square_of_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds a source of filled-in forms that keeps a build busy for days."""
    generator, n_compared = random.Random(5), 0
    form = words(generator, 150)

    def counted(left: np.ndarray, right: np.ndarray) -> float:
        nonlocal n_compared
        n_compared += 1
        return jaccard(left, right)

    monkeypatch.setattr(search, "jaccard", counted)
    texts = [" ".join([*form, *words(generator, 60)]) for _ in range(200)]
    assert not resembling(texts)
    assert 200 < n_compared <= 200 * search.COMPARED


@pytest.mark.parametrize(
    ("texts", "dropped"),
    [
        pytest.param(["one two", "one  two", "one three"], {1: 0}, id="fewer words than a window"),
        pytest.param(["", " \n"], {1: 0}, id="no word"),
        pytest.param([CHINESE, CHINESE[:-8], CHINESE[::-1]], {1: 0}, id="no spaces"),
        pytest.param(["\ud7ff a b c d e\x00", "\ud7ff a b c d e\x00\x00"], {1: 0}, id="control characters"),
        pytest.param(["a b c d e f g " * 3000, "a b c d e f g " * 2], {1: 0}, id="repeats count once"),
        pytest.param([], {}, id="nothing"),
    ],
)
def test_odd_texts(texts: list[str], dropped: dict[int, int]) -> None:
    """Finds a text without windows, or with very many, that ends the search."""
    assert resembling(texts) == dropped


def test_a_corpus_drops_them_and_counts_them_but_none_that_is_held_out_by_hand() -> None:
    """Finds near-duplicates that are dropped from one split alone, or in another build of the same corpus, and a line
    that names another text than the one that stays."""
    generator = random.Random(3)
    texts = [words(generator, 120) for _ in range(40)]
    copies = [" ".join(changed(generator, text, 2)) for text in texts[:10]]
    originals = [" ".join(text) for text in texts]
    source = stories("a", [*originals, *copies])
    config = CorpusConfig("t", {"c": [source]}, 0.3)
    config.cleaning.near_duplicates = LEAST

    report, rejected = IngestReport(), io.StringIO()
    kept = [document.text for _, document, _ in split_documents(config, "c", 0, report, None, rejected)]
    assert sorted(kept) == sorted(originals)
    assert report.sources[source_name(source)].dropped == {"near_duplicate": 10}

    # Each line names the text that stays.
    place_of = {document.text: document.source for document in read_stories(source, 0)}
    lines = [json.loads(line) for line in rejected.getvalue().splitlines()]
    assert [(line["place"], line["reason"], line["resembles"]) for line in lines] == [
        (place_of[copy], "near_duplicate", place_of[originals[n]]) for n, copy in enumerate(copies)
    ]

    held_out = replace(stories("b", copies), held_out=True)
    config = replace(config, corpora={"c": [stories("a", originals), held_out]})
    read = list(read_corpus(config, "c", 0, IngestReport()))
    assert sorted(document.text for split, document in read if split == "val") == sorted(copies)


@pytest.mark.parametrize("across", [False, True])
def test_those_of_an_earlier_corpus_go_where_its_duplicates_go(across: bool) -> None:
    """Finds a corpus that is compared with another one unasked, or not at all."""
    generator = random.Random(4)
    texts = [words(generator, 120) for _ in range(60)]
    copies = [" ".join(changed(generator, text, 2)) for text in texts[:10]]
    others = [" ".join(words(generator, 120)) for _ in range(30)]
    sources = {"x": [stories("a", [" ".join(text) for text in texts])], "y": [stories("b", [*copies, *others])]}
    config = CorpusConfig("t", sources, 0.3)
    config.cleaning.across_corpora, config.cleaning.near_duplicates = across, LEAST
    report = IngestReport()
    list(read_corpus(config, "y", 0, report))
    dropped = report.sources[source_name(sources["y"][0])].dropped
    assert dropped.get("near_duplicate", 0) == (10 if across else 0)
