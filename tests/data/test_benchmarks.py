"""Texts that hold 13 consecutive words of a benchmark are dropped from train and val, and no others."""

import gzip
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.config.corpus import CleaningConfig, CorpusConfig
from dist_lm.data.benchmarks import OWN, WINDOW, Benchmarks, fingerprints
from dist_lm.data.ingest import TextSplits, split_documents
from dist_lm.data.screening import IngestReport, source_name
from dist_lm.errors import ConfigError
from dist_lm.stages.shards.identity import text_fingerprint, tokenizer_fingerprint
from tests.conftest import composed
from tests.data.test_ingest import prose, stories


def contaminated_by_hand(text: str, benchmark: list[str]) -> bool:
    def windows(each: str) -> set[tuple[str, ...]]:
        split = each.split()
        return {tuple(split[i : i + WINDOW]) for i in range(len(split) - WINDOW + 1)}

    return any(windows(text) & windows(each) for each in benchmark)


def test_hits_are_those_of_sets_of_words_and_the_first_words_are_named():
    """Finds a window at the begin or end of a text that is missed, 12 words that count, and wrong words in a report."""
    rng = random.Random(0)
    problems = prose(20, seed=1, words=30)
    benchmarks = Benchmarks([(f"b{n % 2}", problem) for n, problem in enumerate(problems)])
    n_hits = 0
    for text in prose(300, seed=2, words=60):
        words, number = text.split(), rng.randrange(20)
        n_taken, begin = rng.choice((11, 12, 13, 14, 30)), rng.randrange(60)
        copied = problems[number].split()[: min(n_taken, 60 - begin)]
        words[begin : begin + len(copied)] = copied
        text = "\n    ".join(words)
        contamination = benchmarks.first_in(text)
        assert (contamination is not None) == contaminated_by_hand(text, problems)
        if contamination:
            n_hits += 1
            assert contamination == (f"b{number % 2}", " ".join(copied[:WINDOW]))
    assert 60 < n_hits < 240


def test_texts_of_files(tmp_path: Path):
    """Finds fields that are left out, a prompt cut off from its solution, and a compression that is not read."""
    solution = "    return [value for value in values if value > limit]\n"
    prompt = "def above(values, limit):\n    # keep those above it\n"
    rows = [
        {"task_id": "a/0", "prompt": prompt, "canonical_solution": solution},
        {"task_id": 3, "text": "short", "test_list": ["one two three four five six seven", "8 9 10 11 12 13 14"]},
    ]
    lines, listed, plain = tmp_path / "he.jsonl.gz", tmp_path / "mbpp.json", tmp_path / "mine.txt"
    lines.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    listed.write_text(json.dumps(rows[1:]))
    plain.write_text(" ".join(f"word{n}" for n in range(20)))
    for paths, text, name in (
        ([str(lines)], prompt + solution, "he.jsonl.gz"),
        ([str(listed)], " ".join(["x", *rows[1]["test_list"], "y"]), "mbpp.json"),  # pyright: ignore
        ([str(plain), str(lines)], " ".join(f"word{n}" for n in range(4, 18)), "mine.txt"),
    ):
        contamination = Benchmarks.read(paths).first_in(text)
        assert contamination
        assert contamination.benchmark == name
    assert Benchmarks.read([str(lines)]).first_in(solution) is None


def test_our_own_problems_are_known_and_none_of_them_is_missed():
    """Finds a problem of 13 words or more that a corpus may hold."""
    benchmarks = Benchmarks.read([OWN])
    path = Path(__file__).parents[2] / "dist_lm" / "evaluation" / "problems" / "python.jsonl"
    problems = [json.loads(line) for line in path.read_text().splitlines()]
    programs = [problem["prompt"] + problem["solution"] for problem in problems]
    long = [program for program in programs if len(program.split()) >= WINDOW]
    assert len(long) > 20
    for program in long:
        contamination = benchmarks.first_in(f"import os\n\n\n{program}\nprint(1)\n")
        assert contamination
        assert contamination.benchmark == "own_python.jsonl"


def test_train_and_val_lose_them_and_the_report_names_benchmark_and_words(tmp_path: Path):
    """Finds a split that keeps one, a later reading that decides otherwise, and a report without the n-gram."""
    texts, problems = prose(80, seed=5, words=40), prose(2, seed=6, words=20)
    for number in range(0, 80, 4):
        words = texts[number].split()
        words[10:24] = problems[number % 8 // 4].split()[2:16]
        texts[number] = " ".join(words)
    for number, problem in enumerate(problems):
        (tmp_path / f"b{number}.txt").write_text(problem)
    source = stories("benchmarks", texts)
    config = CorpusConfig("t", {"c": [source]}, 0.3)
    config.cleaning.benchmarks = [str(tmp_path / "b0.txt"), str(tmp_path / "b1.txt")]

    report, rejected = IngestReport(), io.StringIO()
    splits = TextSplits(config, 0)
    kept = [(split, document.text) for split, document, _ in split_documents(config, "c", 0, report, splits, rejected)]
    assert sorted(text for _, text in kept) == sorted(texts[number] for number in range(80) if number % 4)
    assert {split for split, _ in kept} == {"train", "val"}
    assert report.sources[source_name(source)].dropped == {"benchmark b0.txt": 10, "benchmark b1.txt": 10}
    lines = [json.loads(line) for line in rejected.getvalue().splitlines()]
    assert {(line["reason"], line["words"]) for line in lines} == {
        (f"benchmark b{number}.txt", " ".join(problem.split()[2:15])) for number, problem in enumerate(problems)
    }
    assert len({line["place"] for line in lines}) == 20


def test_a_changed_benchmark_is_another_corpus_and_none_is_today_s(tmp_path: Path):
    """Finds a corpus that keeps what a new file would drop, and a key that builds all corpora again."""
    path = tmp_path / "b.txt"
    path.write_text("one two")
    plain = composed(["stage=shards"])
    assert "benchmarks" not in text_fingerprint(plain)["corpus"]["cleaning"]
    cleaning = replace(plain.corpus.cleaning, benchmarks=[str(path)])
    config = replace(plain, corpus=replace(plain.corpus, cleaning=cleaning))
    before = text_fingerprint(config)
    assert before["corpus"]["cleaning"]["benchmarks"] == fingerprints([str(path)])
    path.write_text("one three")
    assert text_fingerprint(config) != before
    assert tokenizer_fingerprint(config) == tokenizer_fingerprint(plain)


def test_files_of_one_name_are_compared_each_for_itself(tmp_path: Path):
    """Finds a changed file whose hash that of another `test.jsonl` hides, and a count that does not tell them apart."""
    problems = prose(2, seed=6, words=20)
    paths = [tmp_path / folder / "test.jsonl" for folder in ("humaneval", "mbpp")]
    for path, problem in zip(paths, problems, strict=True):
        path.parent.mkdir()
        path.write_text(json.dumps({"prompt": problem}))
    names = [*map(str, paths)]

    benchmarks = Benchmarks.read(names)
    contaminations = [benchmarks.first_in(problem) for problem in problems]
    assert [contamination and contamination.benchmark for contamination in contaminations] == names
    before = fingerprints(names)
    paths[0].write_text(json.dumps({"prompt": problems[1]}))
    assert fingerprints(names) != before


def test_files_without_a_benchmark_are_refused(tmp_path: Path):
    """Finds a name with a typing error and a download that was cut, by which nothing would be dropped."""
    path = tmp_path / "b.txt"
    with pytest.raises(ConfigError, match=r"corpus\.cleaning\.benchmarks=.*b\.txt: cannot be read"):
        Benchmarks.read([str(path)])
    path.write_text("too few words")
    with pytest.raises(ConfigError, match="expected texts of 13 words or more"):
        Benchmarks.read([str(path)])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"b\.txt: expected UTF-8"):
        Benchmarks.read([str(path)])
    cut = tmp_path / "he.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"prompt": "def above(values, limit):\\n    # keep'))
    with pytest.raises(ConfigError, match=r"he\.jsonl\.gz: is no JSON"):
        Benchmarks.read([str(cut)])
    with pytest.raises(ConfigError, match=r"corpus\.cleaning\.benchmarks="):
        CleaningConfig(benchmarks=[""])
