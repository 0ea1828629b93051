"""The metrics file and the warnings of rank 0: valid JSON, complete lines only, followed across a resume."""

import json
import logging
import os
from pathlib import Path

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.tracking.metrics import (
    LineFollower,
    MetricsFollower,
    MetricsWriter,
    last_metrics,
    read_metrics,
    write_warnings,
)
from dist_lm.tracking.registry import UnknownMetricError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def write(path: Path, *steps: int) -> None:
    with MetricsWriter(path) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1 / step})


def test_lines_are_readable_before_the_writer_is_closed(path: Path) -> None:
    writer = MetricsWriter(path)
    writer.write(1, {"train/loss": 2.5, "train/tokens": 4096}, at=12.0)
    assert list(read_metrics(path)) == [{"step": 1, "time": 12.0, "train/loss": 2.5, "train/tokens": 4096}]


def test_a_name_that_nobody_knows_is_refused_and_nothing_written(path: Path) -> None:
    writer = MetricsWriter(path)
    with pytest.raises(UnknownMetricError, match=r"metric train/los: .*nearest is train/loss"):
        writer.write(1, {"train/grad_norm": 1.0, "train/los": 2.5})
    assert path.read_text() == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_null(path: Path, value: float) -> None:
    MetricsWriter(path).write(1, {"train/grad_norm": value})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["train/grad_norm"] is None


def test_a_resumed_writer_takes_back_later_steps_and_half_a_line(path: Path) -> None:
    write(path, 1, 2, 3, 3, 4)
    with path.open("a") as file:
        file.write('{"step": 5, "ti')
    with MetricsWriter(path) as writer:
        writer.truncate_after(3)
        writer.write(4, {"train/loss": 9.0})
    assert steps(path) == [1, 2, 3, 3, 4]
    assert path.read_bytes().endswith(b"\n")


def test_half_a_line_does_not_spoil_the_next_one(path: Path) -> None:
    path.write_text('{"step": 1, "time": 0}\n{"st')
    write(path, 2)
    assert steps(path) == [1, 2]


def test_damage_in_the_middle_is_named(path: Path) -> None:
    path.write_text('{"step": 1, "time": 0}\n\0\0\0\n{"step": 3, "time": 0}\n')
    with pytest.raises(ArtefactError, match=r"metrics\.jsonl:2: not a metrics line"):
        list(read_metrics(path))


def test_follow_gives_whole_lines_once(path: Path) -> None:
    follower = MetricsFollower(path)
    assert follower.poll() == []
    write(path, 1, 2)
    assert [line["step"] for line in follower.poll()] == [1, 2]
    assert follower.poll() == []
    with path.open("a") as file:
        file.write('{"step": 3,')
        file.flush()
        assert follower.poll() == []
        file.write(' "time": 0}\n')
    assert [line["step"] for line in follower.poll()] == [3]


def test_follow_starts_again_with_a_file_that_was_replaced_or_cut(path: Path) -> None:
    write(path, 1, 2, 3)
    follower = MetricsFollower(path)
    follower.poll()
    with MetricsWriter(path) as writer:
        writer.truncate_after(2)
        writer.write(3, {})
        writer.write(4, {})
    assert [line["step"] for line in follower.poll()] == [1, 2, 3, 4]
    os.truncate(path, 0)
    write(path, 7)
    assert [line["step"] for line in follower.poll()] == [7]


def test_figures_that_arrive_late_are_no_newer_step(path: Path) -> None:
    assert last_metrics(path) == {}
    with MetricsWriter(path) as writer:
        for step in (100, 400):
            writer.write(step, {"train/loss": 1 / step}, at=10.0 * step)
        writer.write(100, {"eval/own_python/pass@1": 0.5}, at=4001.0)
    assert last_metrics(path) == {"step": 400, "time": 4000.0, "train/loss": 1 / 400, "eval/own_python/pass@1": 0.5}


def test_warnings_come_once_in_one_line_and_errors_do_not(tmp_path: Path) -> None:
    path, log = tmp_path / "warnings.log", logging.getLogger("some_package.part")
    path.write_text("of an earlier attempt\n")
    follower = LineFollower(path, from_end=True)
    write_warnings(path, "some_package")
    assert follower.poll() == []
    log.warning("checkpoint %s is\ndamaged", "step_1")
    log.error("the end")
    log.info("nothing")
    logging.getLogger("another_package").warning("not ours")
    assert follower.poll() == [b"checkpoint step_1 is damaged"]
    assert follower.poll() == []
    assert LineFollower(tmp_path / "none", from_end=True).poll() == []
    logging.getLogger("some_package").handlers.clear()
