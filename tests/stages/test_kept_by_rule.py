"""Of equal and of nearly equal documents, the one with most stars stays, of these the earliest, of these the first."""

import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from dist_lm.config.corpus import SPLITS, CleaningConfig, CorpusConfig, SourceConfig
from dist_lm.data.journal import REJECTED
from dist_lm.data.manifest import read_manifest
from dist_lm.data.near_duplicates import jaccard, text_windows
from dist_lm.data.shard_writer import read_origins
from dist_lm.errors import ConfigError
from dist_lm.storage.run_directory import WorkDirectory
from tests.data.mixed_corpora import write_corpora
from tests.data.test_near_duplicates import changed, words
from tests.stages.test_builds_by_tasks import add_near_copies, build, by_tasks, described, in_random_order, new_work

__all__ = ["new_work"]  # a fixture

NewWork = Callable[[str], WorkDirectory]
LEAST = 0.8
COLUMNS = (
    {"stars_column": "stars", "time_column": "created"},
    {"time_column": "created"},
    {"stars_column": "stars"},
    {},
)
"""Columns that each source of a corpus names."""


@dataclass(frozen=True)
class Row:
    """A row of a corpus, in the order of reading."""

    id: str
    text: str
    corpus: int
    stars: float
    time: float
    place: int

    def precedence(self) -> tuple[int, float, float, int]:
        return self.corpus, -self.stars, self.time, self.place


def write_rows(folder: Path, generator: random.Random, n_families: int, across: bool) -> tuple[CorpusConfig, list[Row]]:
    """Writes two corpora of families of texts: each text has copies, and others that differ by a few words. Stars and
    times are often equal and often missing."""
    texts: list[str] = []
    for _ in range(n_families):
        text = words(generator, 60)
        for _ in range(generator.randrange(1, 6)):
            texts += [" ".join(text)] * generator.choice([1, 1, 1, 2, 3])
            text = changed(generator, text, generator.randrange(3))
    generator.shuffle(texts)

    rows: list[Row] = []
    corpora: dict[str, list[SourceConfig]] = {}
    for corpus in range(2):
        sources = []
        for number, columns in enumerate(COLUMNS):
            n_texts = len(texts) // 8
            lines = []
            for text in texts[(4 * corpus + number) * n_texts :][:n_texts]:
                cells = {"stars": generator.choice([None, 0, 3, 3, 7.0]), "created": generator.choice(CREATED)}
                stars = cells["stars"] if "stars_column" in columns else None
                created = TIMES[cells["created"]] if "time_column" in columns else math.inf
                row = Row(f"r{len(rows)}", text, corpus, -math.inf if stars is None else stars, created, len(rows))
                rows.append(row)
                lines.append(json.dumps({"text": text, "id": row.id} | cells))
            path = folder / f"{corpus}-{number}.jsonl"
            path.write_text("\n".join(lines))
            source = SourceConfig("jsonl", "english", "mit", path=[str(path)], id_column="id", **columns)
            sources.append(source)
        corpora[("first", "second")[corpus]] = sources
    cleaning = CleaningConfig(near_duplicates=LEAST, across_corpora=across)
    return CorpusConfig("test", corpora, val_fraction=0.2, cleaning=cleaning), rows


TIMES = {None: math.inf, "2015-03-24T03:12:00Z": 1427166720.0, "2015-03-24": 1427155200.0, 1427155200: 1427155200.0}
CREATED = [*TIMES]


def kept_by_hand(rows: list[Row], across: bool) -> dict[str, tuple[str, list[str]]]:
    """Returns what becomes of each row: its id -> (reason, ids of those that it may be dropped for)."""
    fates: dict[str, tuple[str, list[str]]] = {}
    windows = {row.text: text_windows(row.text) for row in rows}
    for corpora in ([0, 1],) if across else ([0], [1]):
        seen: set[str] = set()
        kept: list[Row] = []
        for row in sorted((row for row in rows if row.corpus in corpora), key=Row.precedence):
            if row.text in seen:
                fates[row.id] = "duplicate", []
                continue
            seen.add(row.text)
            similar = [other.id for other in kept if jaccard(windows[row.text], windows[other.text]) >= LEAST]
            fates[row.id] = ("near_duplicate", similar) if similar else ("", [])
            if not similar:
                kept.append(row)
    return fates


def digest_of(folders: dict[str, Path], root: Path) -> str:
    """Returns a hash of what training sees of corpora, and of the reasons why documents were dropped."""
    content = {
        name: [read_manifest(folder).content, (folder / REJECTED).read_text().replace(str(root), "")]
        for name, folder in folders.items()
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, "80ce12de4f67b07a070e3c19a0a7de52c7d29e3f5be5fd046716c89473acfdaf"),
        (1, "47dfb5b2ca52076620b2a28329bc167f97bd0b163c1a2a65613930b5a1323d1d"),
    ],
)
def test_without_columns_every_byte_stays(
    monkeypatch: pytest.MonkeyPatch, new_work: NewWork, tmp_path: Path, seed: int, expected: str
) -> None:
    """Would find another winner where no source names a column. The hashes are of the release before the columns."""
    generator = random.Random(seed)
    corpus = write_corpora(tmp_path, generator, held_out=bool(seed))
    add_near_copies(tmp_path / "second" / "rows" / "copies.jsonl", tmp_path / "first" / "rows" / "0.jsonl", generator)
    cleaning = replace(corpus.cleaning, across_corpora=True, near_duplicates=0.7)
    corpus = replace(corpus, cleaning=cleaning, max_bad_fraction=0.9)
    assert digest_of(build(new_work("serial"), corpus), tmp_path) == expected
    run_pass = in_random_order(generator)
    assert digest_of(by_tasks(monkeypatch, new_work("tasks"), corpus, 3000, run_pass), tmp_path) == expected


@pytest.mark.heavy
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_the_rule_is_that_of_a_search_by_hand(
    monkeypatch: pytest.MonkeyPatch, new_work: NewWork, tmp_path: Path, seed: int, across: bool
) -> None:
    """Would find a text that leaves for one with fewer stars or a later time, one of an earlier corpus that leaves for
    one of a later corpus, texts of two corpora that are compared unasked, and a winner that depends on tasks."""
    generator = random.Random(seed)
    corpus, rows = write_rows(tmp_path, generator, 60, across)
    expected = kept_by_hand(rows, across)
    near = {number: similar for number, (reason, similar) in expected.items() if reason == "near_duplicate"}
    stay = {number for number, (reason, _) in expected.items() if not reason}
    assert len(near) > 20
    assert any(rows[int(number[1:])].place < rows[int(similar[0][1:])].place for number, similar in near.items())

    folders = build(new_work("serial"), corpus)
    serial = {name: described(folder) for name, folder in folders.items()}
    read: set[str] = set()
    dropped: dict[str, str] = {}
    for folder in folders.values():
        manifest = read_manifest(folder)
        shards = [shard.name for split in SPLITS for shard in manifest.splits[split].shards]
        read |= {origin.source for name in shards for origin in read_origins(folder / name)}
        lines = map(json.loads, (folder / REJECTED).read_text().splitlines())
        dropped |= {line["place"]: line["resembles"] for line in lines}
    assert dropped.keys() == near.keys()
    assert all(dropped[number] in near[number] for number in near)
    # Val that train contains is dropped, too.
    assert read <= stay
    assert len(read) > 0.8 * len(stay)

    for task_bytes in (1, 1 << 30):
        work = new_work(f"tasks{task_bytes}")
        folders = by_tasks(monkeypatch, work, corpus, task_bytes, in_random_order(generator))
        assert {name: described(folder) for name, folder in folders.items()} == serial


def write_repositories(folder: Path, generator: random.Random, n_families: int) -> dict[str, dict[str, str]]:
    """Writes repositories: some are forks of others with changed, added or missing files, and many have a file of
    another one. Returns their files: repository -> name -> text; a file of no repository is one of its own."""
    repositories: list[dict[str, str]] = []
    for _ in range(n_families):
        files = {f"{number}.py": " ".join(words(generator, 60)) for number in range(generator.randrange(2, 7))}
        for _ in range(generator.randrange(1, 4)):
            repositories.append(files)
            files = dict(files)
            name = generator.choice([*files])
            files[name] = " ".join(changed(generator, files[name].split(), generator.randrange(4)))
            if generator.random() < 0.3:
                files["more.py"] = " ".join(words(generator, generator.choice([8, 200])))
    foreign = " ".join(words(generator, 20))
    for files in generator.sample(repositories, n_families // 2):
        files["vendored.py"] = generator.choice([foreign, *generator.choice(repositories).values()])
    generator.shuffle(repositories)

    written = {f"r{number:03d}": dict(files) for number, files in enumerate(repositories)}
    for name, files in written.items():
        (folder / name / ".git").mkdir(parents=True)
        (folder / name / ".git" / "HEAD").touch()
        for file, text in files.items():
            (folder / name / file).write_text(text)
    for number, text in enumerate(generator.sample([*repositories[0].values(), *repositories[1].values()], 3)):
        (folder / f"s{number}.py").write_text(text)
        written[f"s{number}.py"] = {"": text}
    return written


def repositories_by_hand(repositories: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    """Returns the repositories that leave, each with those that it resembles and that stay."""
    kept: dict[str, np.ndarray] = {}
    dropped: dict[str, list[str]] = {}
    for name, files in sorted(repositories.items()):
        windows = np.unique(np.concatenate([text_windows(text) for text in files.values()]))
        similar = [other for other, others in kept.items() if jaccard(windows, others) >= LEAST]
        if similar:
            dropped[name] = similar
        else:
            kept[name] = windows
    return dropped


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(3))
def test_a_fork_leaves_as_a_whole_and_no_text_with_it(
    monkeypatch: pytest.MonkeyPatch, new_work: NewWork, tmp_path: Path, seed: int
) -> None:
    """Would find a file of a fork that stays, a repository that leaves for a file that it has in common with another
    one, a text whose only copy left with a fork, and a result that depends on tasks."""
    generator = random.Random(seed)
    repositories = write_repositories(tmp_path / "code", generator, 12)
    expected = repositories_by_hand(repositories)
    assert len(expected) > 3
    assert len(repositories) - len(expected) > 8

    source = SourceConfig("files", "python", "mit", path=[str(tmp_path / "code")])
    cleaning = CleaningConfig(near_duplicates=LEAST, near_duplicates_by="repository")
    corpus = CorpusConfig("test", {"code": [source]}, val_fraction=0.2, build="tasks", cleaning=cleaning)
    results = []
    for task_bytes in (1, 1 << 30):
        work = new_work(f"tasks{task_bytes}")
        folder = by_tasks(monkeypatch, work, corpus, task_bytes, in_random_order(generator))["code"]
        results.append(described(folder))
        assert results[-1] == results[0]

    def repository_of(place: str) -> str:
        return Path(place).relative_to(tmp_path / "code").parts[0]

    lines = [json.loads(line) for line in results[0]["rejected"].splitlines()]
    left: dict[str, set[str]] = {}
    for line in lines:
        assert line["reason"] == "near_duplicate"
        place, stays = line["place"], line["resembles"]
        assert (stays if stays in repositories else repository_of(stays)) in expected[repository_of(place)]
        left.setdefault(repository_of(place), set()).add(place)
    assert left.keys() == expected.keys()
    for name, places in left.items():
        assert len(places) == len(repositories[name])

    # Of the texts that stay, each stays once, but for val that train contains.
    texts = {text for name, files in repositories.items() if name not in expected for text in files.values()}
    dropped = [tally["dropped"] for tally in results[0]["ingest"]["sources"].values()]
    n_overlapping = sum(reasons.get("overlapping", 0) for reasons in dropped)
    assert sum(map(len, results[0]["origins"].values())) == len(texts) - n_overlapping


def test_repositories_need_a_build_by_tasks_and_a_similarity() -> None:
    """Would find a key that is silently passed over."""
    cleaning = CleaningConfig(near_duplicates=LEAST, near_duplicates_by="repository")
    with pytest.raises(ConfigError, match=r"near_duplicates_by=repository: expected .* set corpus\.build=tasks"):
        CorpusConfig("test", {}, cleaning=cleaning)
    for changes in ({"near_duplicates_by": "repository"}, {"near_duplicates": LEAST, "near_duplicates_by": "folder"}):
        with pytest.raises(ConfigError, match=r"corpus\.cleaning\.near_duplicates_by=\w+: expected document, or"):
            CleaningConfig(**changes)
