"""A build by tasks of the text of installed packages, with planted near-duplicates, on any cluster and under kills."""

import hashlib
import json
import multiprocessing
import random
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from dist_lm.cluster.build_workers import ray_workers
from dist_lm.config.corpus import CleaningConfig, CorpusConfig, SourceConfig
from dist_lm.data import build_by_tasks
from dist_lm.data.build_by_tasks import plan_of
from dist_lm.data.journal import REJECTED
from dist_lm.data.near_duplicates import jaccard, text_windows
from dist_lm.stages.shards.stage import STAGE as SHARDS
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.console import Console
from tests.cluster.loopback_ray import loopback_ray
from tests.data.test_near_duplicates import changed
from tests.patience import patient
from tests.stages.test_builds_by_tasks import by_tasks, config_of, files_of, new_work, results_of

__all__ = ["new_work"]  # a fixture

N_TASKS = 24
N_KILLS = 10
FOLDERS = (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib")), Path("/usr/share"))
SUFFIXES = {".py", ".pyi", ".txt", ".md", ".rst", ".json", ".h", ".c", ".cpp", ".js", ".html", ".xml", ".yaml"}


@dataclass(frozen=True)
class Planted:
    """A changed copy of a text."""

    key: str
    original: str  # key of the first text that is equal to the one that was copied
    similarity: float  # to the original


def real_texts(n_bytes: int) -> Iterator[str]:
    """Yields texts of 50 words or more of files of this machine, at most `n_bytes` together."""
    for path in (path for folder in FOLDERS for path in sorted(folder.rglob("*"))):
        if path.suffix not in SUFFIXES or not path.is_file():
            continue
        text = path.read_bytes()[: 1 << 20].decode(errors="replace")
        if len(text.split()) < 50:
            continue
        n_bytes -= len(text)
        if n_bytes < 0:
            return
        yield text


def write_corpus(folder: Path, n_bytes: int, generator: random.Random) -> tuple[CorpusConfig, list[Planted]]:
    """Writes texts and behind them a changed copy of each fourth one, at similarities from below 0.5 to 1."""
    folder.mkdir()
    n_read, planted, copies = 0, [], []
    first_of_equals: dict[str, str] = {}  # hash of a text -> its key; a build drops texts that are equal to it
    with (folder / "0.jsonl").open("w") as rows:
        for text in real_texts(n_bytes):
            n_read += 1
            key = f"text-{n_read}"
            original = first_of_equals.setdefault(hashlib.sha256(text.encode()).hexdigest(), key)
            rows.write(json.dumps({"text": text, "id": key}) + "\n")
            if n_read % 4:
                continue
            pieces = text.split(" ")
            copy = " ".join(changed(generator, pieces, 1 + int(generator.random() * 0.06 * (len(pieces) - 1))))
            similarity = jaccard(text_windows(text), text_windows(copy))
            planted.append(Planted(f"planted-{n_read}", original, similarity))
            copies.append(json.dumps({"text": copy, "id": planted[-1].key}))

    lines = [*(folder / "0.jsonl").read_text().splitlines(), *copies]
    (folder / "0.jsonl").unlink()
    for number in range(N_TASKS):
        (folder / f"{number:02d}.jsonl").write_text(
            "\n".join(lines[number * len(lines) // N_TASKS : (number + 1) * len(lines) // N_TASKS])
        )
    source = SourceConfig("jsonl", "code", licence="mit", path=[f"{folder}/*.jsonl"], id_column="id")
    cleaning = CleaningConfig(near_duplicates=0.8, encoding=False)
    return CorpusConfig("test", {"real": [source]}, cleaning=cleaning), planted


def resembled_texts(corpus: Path) -> dict[str, str]:
    """Returns the key of the text that each near-duplicate was dropped for."""
    rows = map(json.loads, (corpus / REJECTED).read_text().splitlines())
    return {key_of(row["place"]): key_of(row["resembles"]) for row in rows if "resembles" in row}


def key_of(place: str) -> str:
    return place.rsplit(" ", 1)[-1]


def least_similarity(folder: Path, resembled: dict[str, str]) -> float:
    """Returns the smallest similarity of a dropped text to the one that it was dropped for."""
    compared = {*resembled, *resembled.values()}
    windows = {}
    for path in folder.glob("*.jsonl"):
        with path.open() as rows:
            for row in map(json.loads, rows):
                if row["id"] in compared:
                    windows[row["id"]] = text_windows(row["text"])
    return min(jaccard(windows[dropped], windows[kept]) for dropped, kept in resembled.items())


def build_with_workers(work: WorkDirectory, corpus: CorpusConfig, workers: int) -> None:
    """Builds in a process of its own, whose plan has a task for each file."""
    build_by_tasks.plan_of = partial(plan_of, task_bytes=1)
    config = config_of(work, corpus, build="tasks")
    SHARDS.build(replace(config, tokenizer=replace(config.tokenizer, workers=workers)), Console())


def run_and_kill(work: WorkDirectory, build: Callable[[], None], generator: random.Random, n_kills: int) -> int:
    """Runs a build as a command, which or whose worker is killed now and then. Returns the number of kills."""
    context = multiprocessing.get_context("spawn")
    deadline = time.monotonic() + patient(3600)
    n_killed = 0
    command = None
    while command is None or command.exitcode:
        command = context.Process(target=build)
        command.start()
        while command.is_alive():
            n_results = len(results_of(work)) + generator.randrange(1, 2 * N_TASKS // 3)
            while command.is_alive() and (n_killed == n_kills or len(results_of(work)) < n_results):
                assert time.monotonic() < deadline
                command.join(0.05)

            with suppress(psutil.NoSuchProcess, IndexError):
                killed = psutil.Process(command.pid)
                if generator.random() < 0.5:
                    workers = [child for child in killed.children() if "spawn_main" in " ".join(child.cmdline())]
                    killed = generator.choice(workers)
                killed.kill()
                n_killed += 1
        command.join()
    return n_killed


@pytest.mark.parametrize(
    "megabytes",
    [
        pytest.param(10, marks=pytest.mark.heavy),
        pytest.param(200, marks=[pytest.mark.bars, pytest.mark.timeout(7200)]),
        pytest.param(2000, marks=[pytest.mark.bars, pytest.mark.timeout(36000)]),
    ],
)
def test_real_text_gives_the_same_bytes_anywhere_and_loses_its_near_duplicates(
    monkeypatch, new_work, tmp_path, megabytes
):
    """Would find a byte that depends on workers, nodes or kills where texts are long, shared and foreign; a
    near-duplicate that passes because its original is in another task; and a text that is dropped for little."""
    generator = random.Random(megabytes)
    corpus, planted = write_corpus(tmp_path / "text", megabytes * 1_000_000, generator)
    expected: dict[str, bytes] = {}
    for workers in (1, 2, 4):
        work = new_work(f"workers{workers}")
        started = time.monotonic()
        command = multiprocessing.get_context("spawn").Process(target=build_with_workers, args=(work, corpus, workers))
        command.start()
        command.join()
        assert command.exitcode == 0
        print(f"{megabytes} MB, {workers} workers: {time.monotonic() - started:.0f} s")
        files = files_of({"real": work.corpus("real")})
        expected = expected or files
        assert files == expected

    resembled = resembled_texts(work.corpus("real"))
    # A text may stay that resembles only a dropped one: then nothing that stays is its near-duplicate.
    similar = [copy for copy in planted if copy.similarity >= 0.8]
    both_stay = [copy for copy in similar if not {copy.key, copy.original} & resembled.keys()]
    print(f"{len(planted)} planted, {len(similar)} at 0.8 or more, both stay of {len(both_stay)}")
    assert len(similar) > 10
    assert len(both_stay) <= 0.05 * len(similar)
    assert {copy.key for copy in planted} & resembled.keys()

    least = least_similarity(tmp_path / "text", resembled)
    print(f"{len(resembled)} dropped in all, at {least:.3f} or more")
    assert least >= 0.8

    work = new_work("killed")
    n_killed = run_and_kill(work, partial(build_with_workers, work, corpus, 2), generator, N_KILLS - 1)
    print(f"killed {n_killed} times")
    assert n_killed > N_KILLS // 2
    assert files_of({"real": work.corpus("real")}) == expected

    with loopback_ray(tmp_path, nodes=2) as ray, ray_workers(ray.config()) as run_pass:

        def run_and_lose(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
            for place, number in enumerate(run_pass(folder, pass_name, numbers)):
                if place == 0 and pass_name == "write":
                    ray.lose(1)
                yield number

        work = new_work("nodes")
        folders = by_tasks(monkeypatch, work, corpus, 1, run_and_lose)
        assert files_of(folders) == expected
