"""Train and val: sides that stay, a val of bounded size, and nothing of val in train, whatever the source."""

import random
from dataclasses import asdict

import pytest

from dist_lm.config.corpus import SPLITS, CorpusConfig, SourceConfig
from dist_lm.data import screening
from dist_lm.data.ingest import TextSplits, split_of_group
from dist_lm.data.screening import IngestReport, source_name
from dist_lm.data.sources.reader import text_hash
from dist_lm.errors import ArtefactError, ConfigError
from tests.data.own_readers import STORIES
from tests.data.reading import read_corpus, seen_texts
from tests.data.test_corpus import config_of, own


def stories(dataset: str, texts: list[str], function: str = "read_stories", **options) -> SourceConfig:
    STORIES[dataset] = texts
    return SourceConfig(f"tests.data.own_readers:{function}", "english", dataset=dataset, **options)


def prose(n: int, seed: int = 0, words: int = 40) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(10**6)}" for _ in range(words)) for _ in range(n)]


def sides(config: CorpusConfig, name: str = "c", report: IngestReport | None = None) -> dict[str, list[str]]:
    """Split -> texts."""
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, document in read_corpus(config, name, 0, report or IngestReport()):
        found[split].append(document.text)
    return found


def test_near_duplicates_leave_val():
    texts = prose(200)
    report = IngestReport()
    found = sides(config_of(stories("a", [*texts, *(f"{text}\n# x" for text in texts[:150])])), report=report)
    assert seen_texts(found["val"], found["train"]) == set()
    assert len(found["val"]) > 10
    assert report.languages["english"].dropped["overlapping"] > 50


def test_val_of_a_corpus_is_compared_with_train_of_every_source_and_corpus():
    texts = prose(100)
    again = [f"said: {text}" for text in texts]
    one, two, three = stories("a", texts), stories("b", again[:40]), stories("c", [*again[40:], *prose(50, 1)])
    config = CorpusConfig("test", {"x": [one, two], "y": [three]}, 0.3)
    found = {name: sides(config, name) for name in config.corpora}
    train = [text for one in found.values() for text in one["train"]]
    for name in config.corpora:
        assert found[name]["val"]
        assert seen_texts(found[name]["val"], train) == set()


@pytest.mark.heavy
def test_val_is_capped_and_a_corpus_that_grows_moves_documents_from_val_to_train_alone():
    texts = prose(1200)
    before: dict[str, list[str]] | None = None
    moves = 0
    for n in range(200, 1201, 100):
        config = config_of(stories("a", texts[:n]))
        config.val_tokens = 5000  # 20,000 bytes
        found = sides(config)
        assert sum(map(len, found["val"])) <= 20_000
        if before:
            assert not set(before["train"]) & set(found["val"])
            moves += bool(set(before["val"]) & set(found["train"]))
        before = found
    assert 0 < moves <= 3, "val moves when it is halved, not with every document"


def test_the_order_of_documents_does_not_decide_what_val_holds():
    texts = prose(400)
    config = config_of(stories("a", texts))
    config.val_tokens = 3000
    expected = {split: set(texts) for split, texts in sides(config).items()}
    STORIES["a"] = texts[::-1]
    assert {split: set(texts) for split, texts in sides(config).items()} == expected


def test_train_documents_that_contain_a_held_out_one_are_dropped_and_counted():
    texts = prose(100)
    val = texts[:10]
    train = [*texts[5:50], *(f"see: {text}" for text in val[:5]), " ".join(val[7].split()[10:30])]
    report = IngestReport()
    given = stories("val", val, held_out=True)
    config = CorpusConfig("test", {"c": [stories("a", train), given], "d": [stories("b", val[:3] + texts[50:])]}, 0.3)
    found = sides(config, report=report)
    assert found == {"train": texts[10:50], "val": val}
    assert report.sources[source_name(config.corpora["c"][0])].dropped == {"contains_val": 11}
    other = sides(config, "d")
    assert set(other["train"] + other["val"]) - set(val) == set(texts[50:])
    assert not set(other["train"]) & set(val)


def test_a_held_out_document_that_several_train_documents_hold_together_is_dropped():
    words = prose(1, words=100)[0].split()
    rest = [prose(1, seed, words=100)[0] for seed in range(1, 5)]
    train = [" ".join(words[25 * i : 25 * i + 25]) + " " + text for i, text in enumerate(rest)]
    report = IngestReport()
    given = stories("v", [" ".join(words), *prose(3, 9)], held_out=True)
    found = sides(config_of(stories("a", train), given), report=report)
    assert found == {"train": train, "val": STORIES["v"][1:]}
    assert report.languages["english"].dropped == {"overlapping": 1}


def test_held_out_text_past_the_cap_is_refused_by_the_name_of_the_key():
    config = config_of(stories("a", prose(10)), stories("v", prose(10, 1), held_out=True))
    config.val_tokens = 10
    with pytest.raises(ConfigError, match=r"corpus c: .*held_out=true .*corpus.val_tokens=10 .*larger"):
        sides(config)


def test_conversations_that_share_a_group_with_a_held_out_one_are_dropped():
    talks = stories("t", ["a one", "b two", "c three"], "read_talks")
    given = stories("g", ["b held out"], "read_talks", held_out=True)
    report = IngestReport()
    assert sides(config_of(talks, given), report=report) == {"train": ["a one", "c three"], "val": ["b held out"]}
    assert report.languages["talk"].dropped == {"contains_val": 1}


def test_small_and_large_sources_give_the_same(monkeypatch):
    config = config_of(stories("a", prose(100)), own("read_numbers"))
    expected = list(read_corpus(config, "c", 0, IngestReport()))
    monkeypatch.setattr(screening, "CACHED_CHARACTERS", 3000)
    texts = TextSplits(config, 0)
    assert list(read_corpus(config, "c", 0, IngestReport(), texts)) == expected
    assert len(texts.reader._cache) == 1


def test_what_is_not_kept_is_counted_by_language_and_source():
    report = IngestReport()
    source = own("read_mixed")
    kept = [d for _, d in read_corpus(config_of(source), "c", 0, report)]
    counts = report.languages["english"]
    assert (counts.seen, counts.kept) == (28, 22)
    assert counts.dropped == {"duplicate": 1, "empty": 2, "too_long": 1, "invalid_utf8": 1, "unreadable": 1}
    assert report.sources == {source_name(source): counts}
    assert kept[0].text == "#!/bin/sh\r\necho one\r\n"
    assert report.rejected == ["mixed:4: too_long", "mixed:invalid_utf8: invalid_utf8", "mixed:unreadable: unreadable"]
    assert asdict(report)["languages"]["english"]["bytes"]["train"] == counts.bytes["train"]
    for split in SPLITS:
        assert counts.bytes[split] > counts.documents[split] > 0
    assert sum(counts.bytes.values()) == sum(len(d.text.encode()) for d in kept)


def test_a_text_with_a_lone_surrogate_is_dropped_and_counted():
    report = IngestReport()
    texts = prose(50)
    found = sides(config_of(stories("a", [*texts, f"{'f' * 64}\tbad \ud800 tail"])), report=report)
    assert sorted(found["train"] + found["val"]) == sorted(texts)
    assert report.languages["english"].dropped == {"not_unicode": 1}


def test_sources_in_another_order_put_every_text_on_the_same_side():
    sources = [own("read_numbers"), own("read_seeded")]
    found = {d.source: split for split, d in read_corpus(config_of(*sources), "c", 0, IngestReport())}
    turned = config_of(*reversed(sources))
    assert found == {d.source: split for split, d in read_corpus(turned, "c", 0, IngestReport())}
    assert set(found.values()) == set(SPLITS)


def test_limit_counts_documents_kept():
    report = IngestReport()
    kept = [d for _, d in read_corpus(config_of(own("read_mixed", limit=10), val_fraction=0.5), "c", 0, report)]
    assert len(kept) == report.languages["english"].kept == 10
    assert kept[-1].text == "#!/bin/sh\necho number 7 of 20\n"


def test_the_split_depends_on_the_group_alone():
    groups = [text_hash(str(i)) for i in range(4000)]
    val = [split_of_group(group, 0.05) == "val" for group in groups]
    assert 120 < sum(val) < 280
    assert all(split_of_group(group, 0.2) == "val" for group, held in zip(groups, val, strict=True) if held)


def test_no_held_out_document_is_an_error_that_names_the_key_and_a_share_that_helps():
    with pytest.raises(ArtefactError, match=r"none of its 40 documents .*val_fraction=1e-09: expected above 0\.\d"):
        sides(config_of(own("read_numbers"), val_fraction=1e-9))
