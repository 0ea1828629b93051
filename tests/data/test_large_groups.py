"""Near-duplicates of very many texts: what the processes of a build by tasks hold."""

import multiprocessing
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dist_lm.config.corpus import CleaningConfig, CorpusConfig, SourceConfig
from dist_lm.data.build_by_tasks import choose_searches
from dist_lm.data.build_folder import COPIES, ENDS, RUN, Build, write_strings
from dist_lm.data.build_near_duplicates import PAIRS, SEARCHED, SEARCHES, TEXTS, WINDOWS_ENDS, WINDOWS_OF_TEXTS
from dist_lm.data.build_plan import BuildTask
from dist_lm.data.build_tasks import run_task
from dist_lm.data.sorted_runs import RECORD
from dist_lm.data.task_results import writing

N_WINDOWS = 60


def new_build(folder: Path, n_tasks: int) -> Build:
    config = CorpusConfig(
        "test",
        {"text": [SourceConfig("jsonl", "english", path="none")]},
        cleaning=CleaningConfig(near_duplicates=0.8),
    )
    build = Build(folder)
    build.write(config, 0, folder / "none", [BuildTask("text", 0, ()) for _ in range(n_tasks)], {})
    return build


def peak_of(function: Callable[[], None]) -> tuple[int, float]:
    """Returns the largest memory of a process of its own that calls a function, in bytes, and the seconds it took."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measured, function).result()


def _measured(function: Callable[[], None]) -> tuple[int, float]:
    began = time.process_time()
    function()
    # `ru_maxrss` would count the process that started this one, which may be larger.
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(peak) * 1024, time.process_time() - began


@pytest.mark.heavy
@pytest.mark.parametrize("n_texts", [50_000, pytest.param(50_000_000, marks=pytest.mark.bars)])
def test_pairs_of_very_many_texts_are_joined_below_a_gigabyte(tmp_path: Path, n_texts: int) -> None:
    """Would find a join that holds all pairs, or whose time is the square of a group, and a text that is in no search.

    Measured: 50 M texts, a fifth of them with neighbours in all bands, a fiftieth of them in one group."""
    n_tasks, n_results = 25, 240
    build = new_build(tmp_path / "build", n_tasks)
    for number in range(n_tasks):
        with writing(build.result("survey", number)) as result:
            (result / RUN).touch()
            os.truncate(result / RUN, n_texts // n_tasks * RECORD.itemsize)

    random = np.random.default_rng(0)
    is_copied = random.random(n_texts) < 0.2
    is_copied[: n_texts // 50] = True
    texts = np.flatnonzero(is_copied)
    n_group = n_texts // 50
    for number in range(n_results):
        # Copies stand anywhere; a twelfth of the pairs of each band is in a result.
        part = texts[n_group + number % 12 :: 12]
        pairs = np.stack([part, texts[n_group:][-1 - np.searchsorted(texts[n_group:], part)]], axis=1)
        if number % 12 == 0:
            group = random.permutation(n_group)
            pairs = np.concatenate([pairs, np.stack([group[:-1], group[1:]], axis=1)])
        places = np.stack(np.divmod(pairs, n_texts // n_tasks), axis=2).astype(np.uint32)
        with writing(build.result("neighbours", number)) as result:
            np.save(result / PAIRS, places)

    peak, seconds = peak_of(partial(choose_searches_in, tmp_path / "build", n_results))
    print(f"{n_texts:,} texts: {peak / 2**20:.0f} MiB, {seconds:.1f} CPU s")
    assert peak < 10**9
    searched = np.fromfile(build.result("searches", 0) / SEARCHES, SEARCHED)
    assert len(searched) == len(texts)
    assert len(set(searched["search"][:n_group])) == 1
    assert np.load(build.result("searches", 0) / ENDS)[-1] == len(texts)


def choose_searches_in(folder: Path, n_results: int) -> None:
    choose_searches(Build(folder), n_results)


@pytest.mark.heavy
@pytest.mark.parametrize("n_texts", [5_000, pytest.param(1_000_000, marks=pytest.mark.bars)])
@pytest.mark.parametrize("n_changed", [2, 12])
def test_a_group_of_very_many_texts_is_searched_below_a_gigabyte(tmp_path: Path, n_texts: int, n_changed: int) -> None:
    """Would find objects for each text of a group, and comparisons that are the square of their number.

    With 2 changed windows texts are nearly equal, and all go; with 12 they are half alike, and most stay."""
    n_tasks = 4
    build = new_build(tmp_path / "build", n_tasks)
    random = np.random.default_rng(0)
    common = np.sort(random.integers(0, 2**64, N_WINDOWS, np.uint64))
    for number in range(n_tasks):
        n_own = n_texts // n_tasks
        texts = np.zeros(n_own, SEARCHED)
        texts["number"] = np.arange(n_own)
        with writing(build.result("windows", number)) as result:
            np.save(result / TEXTS, texts)
            np.save(result / WINDOWS_ENDS, np.arange(n_own + 1) * N_WINDOWS)
            write_strings(result, (f"{number}-{text}" for text in range(n_own)))
            with (result / WINDOWS_OF_TEXTS).open("wb") as file:
                for _ in range(n_own):
                    windows = common.copy()
                    windows[random.choice(N_WINDOWS, n_changed, replace=False)] = random.integers(
                        0, 2**64, n_changed, np.uint64
                    )
                    file.write(np.sort(windows).tobytes())

    peak, seconds = peak_of(partial(run_task, tmp_path / "build", "search", 0))
    _, numbers = np.load(build.result("search", 0) / COPIES)
    n_kept = n_texts - len(numbers)
    print(f"{n_texts:,} texts, {n_kept:,} stay: {peak / 2**20:.0f} MiB, {seconds / n_texts * 1e6:.0f} CPU µs a text")
    assert peak < 10**9
    assert n_kept < n_texts / 100 if n_changed == 2 else n_kept > n_texts / 2
