"""The process that writes beside training: what it writes, and what a kill of it, of its rank or of both leaves."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import all_gather
from dist_lm.storage.process import is_alive
from dist_lm.training import checkpoint_files, checkpoint_plan, checkpoint_saver
from dist_lm.training.checkpoint_saver import CheckpointWriteError
from tests.cluster.test_checkpoint_saver import BLOCKED_S, Run, steps, values
from tests.parallel.ranks import RankGroup, RankGroups
from tests.patience import patient

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.heavy,
    pytest.mark.skipif(sys.platform != "linux", reason="saves by a thread elsewhere"),
]

DEADLINE_S = patient(60)
MIB = 1 << 20


@contextmanager
def process_for_any_size() -> Iterator[None]:
    """Small models have a process in each rank, too; the next test on these ranks finds what was before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_saver, "PROCESS_BYTES", 0)
        patch.setattr(checkpoint_plan, "FILE_BYTES", 50_000)  # two files and more: each rank writes one
        yield


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def process_of(run: Run) -> psutil.Process:
    assert run.saver.process is not None
    return psutil.Process(run.saver.process.pid)


def save_and_go_on(world: World, checkpoints: Path) -> list[set[int]]:
    """The processes that wrote the two saves, of each rank."""
    with process_for_any_size():
        run = Run(world, checkpoints, tp=2)
        pids = set()
        with run.saver:
            for step in (1, 2):
                run.fill(step)
                run.save(step)
                run.fill(-1.0)
                pids.add(process_of(run).pid)
            writer = process_of(run)
        assert not is_alive(writer)
    return [set(own) for own in all_gather(sorted(pids), list[int])]


def test_a_process_writes_what_was_when_the_save_was_due(ranks: RankGroups, tmp_path: Path):
    """Finds a process that is started for each save, one that outlives the saver, or memory that training changes."""
    pids = ranks.run(2, save_and_go_on, tmp_path)
    assert [len(of_rank) for of_rank in pids] == [1, 1]
    assert pids[0] != pids[1]
    assert values(tmp_path, 1) == {1.0}
    assert values(tmp_path, 2) == {2.0}
    for step in checkpoint_files.steps_in(tmp_path):
        checkpoint_files.verify(step)


def lose_the_process(world: World, checkpoints: Path) -> list[tuple[str, bool]]:
    """What each rank is told of a save whose process of rank 1 was killed, and whether it knew before it asked."""
    with process_for_any_size():
        run = Run(world, checkpoints)
        with run.saver:
            run.fill(1.0)
            run.save(1)
            run.saver.wait()

            go = run.hold()
            run.save(2)
            if world.rank == 1:
                process_of(run).kill()
            go.set()
            in_flight = run.saver.in_flight
            assert in_flight is not None
            in_flight.exception(BLOCKED_S)
            knew = run.saver.has_failed
            message = ""
            try:
                run.saver.wait()
            except CheckpointWriteError as error:
                message = str(error)

            run.fill(3.0)
            run.save(3)
    return all_gather((message, knew), tuple[str, bool])


def test_a_lost_process_fails_its_save_on_every_rank_and_not_the_next(ranks: RankGroups, tmp_path: Path):
    """Finds a loss that is swallowed, that only one rank learns of, or that no later save survives."""
    first, second = ranks.run(2, lose_the_process, tmp_path)
    assert first == second
    message, knew = first
    assert knew
    assert "step_00000002 could not be written" in message
    assert "has ended: exit code -9" in message
    assert "step_00000001 is intact" in message
    assert steps(tmp_path) == ["step_00000001", "step_00000003"]
    assert values(tmp_path, 1) == {1.0}
    assert values(tmp_path, 3) == {3.0}


def kill_processes_at_work(world: World, checkpoints: Path) -> list[str]:
    """What came of saves whose process was killed when its file had so many bytes."""
    outcomes = []
    with process_for_any_size(), pytest.MonkeyPatch.context() as patch:
        large = {f"model.{number}": torch.full((4 * MIB,), 1.0) for number in range(4)}
        patch.setattr(checkpoint_saver, "tensors_of", lambda *arguments: dict(large))
        run = Run(world, checkpoints)
        with run.saver:
            run.save(1)
            run.saver.wait()
            for step, n_bytes in enumerate((1, 10 * MIB, 40 * MIB, 64 * MIB, 0), start=2):
                for tensor in large.values():
                    tensor.fill_(step)
                folder = checkpoints / f".{checkpoint_files.step_name(step)}"
                run.save(step)
                in_flight = run.saver.in_flight
                assert in_flight is not None
                wait_until(
                    lambda: in_flight.done() or sum(size_of(path) for path in folder.glob("*")) >= n_bytes,  # noqa: B023
                    "the file grows",
                )
                process_of(run).kill()
                try:
                    run.saver.wait()
                    outcomes.append("complete")
                except CheckpointWriteError:
                    outcomes.append("failed")
                complete = max([1, *(n for n, outcome in enumerate(outcomes, start=2) if outcome == "complete")])
                newest = checkpoint_files.newest_intact(checkpoint_files.steps_in(checkpoints))
                assert newest is not None
                # A process killed between the rename and its answer leaves a whole checkpoint of a save that failed.
                newest_step = checkpoint_files.step_of(newest)
                assert newest_step in (complete, step)
                assert values(checkpoints, newest_step) == {float(newest_step)}
    return outcomes


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed
        return 0


def test_a_process_killed_in_its_work_leaves_the_checkpoint_before(ranks: RankGroups, tmp_path: Path):
    """Finds a save that is believed although its process was killed in the middle of a file, or before a hash."""
    outcomes = ranks.run(1, kill_processes_at_work, tmp_path)
    assert "failed" in outcomes


def save_and_stop_the_process(world: World, checkpoints: Path) -> int:
    """Begins a second save, whose process does nothing; the process."""
    with process_for_any_size():
        run = Run(world, checkpoints)
        run.fill(1.0)
        run.save(1)
        run.saver.wait()
        process = process_of(run)
        process.suspend()
        wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "the process stops")
        run.save(2)
        KEPT.append(run)  # it must not end with this function
        return process.pid


KEPT: list[Run] = []


def continue_run(world: World, checkpoints: Path) -> None:
    run = Run(world, checkpoints)
    with run.saver:
        run.fill(2.0)
        run.save(2)


@pytest.mark.parametrize("both", [False, True])
def test_a_killed_rank_takes_its_process_along(ranks: RankGroups, tmp_path: Path, both: bool):
    """Finds a process that outlives its rank and writes on, even one that cannot read that its socket has closed."""
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    group = RankGroup(1, tmp_path / "store")
    try:
        group.pipes[0].send((save_and_stop_the_process, (checkpoints,), {}))
        assert group.pipes[0].poll(BLOCKED_S)
        failure, pid = group.pipes[0].recv()
        assert failure is None
        process = psutil.Process(pid)
        if both:
            process.kill()
        pid_of_rank = group.processes[0].pid
        assert pid_of_rank is not None
        os.kill(pid_of_rank, signal.SIGKILL)
        wait_until(lambda: not is_alive(process), "the process ends with its rank")
    finally:
        group.kill()

    # What was there is whole, and the run goes on from it.
    assert steps(checkpoints) == ["step_00000001"]
    checkpoint_files.verify(checkpoints / "step_00000001")
    ranks.run(1, continue_run, checkpoints)
    assert values(checkpoints, 1) == {1.0}
    assert values(checkpoints, 2) == {2.0}
    assert not list(checkpoints.glob(".step_*"))


def save_despite_signals(world: World, checkpoints: Path) -> None:
    """Saves while the process gets what a node sends to all processes before its time ends."""
    with process_for_any_size():
        run = Run(world, checkpoints)
        with run.saver:
            for step, number in enumerate((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), start=1):
                run.fill(step)
                go = run.hold()
                run.save(step)
                process_of(run).send_signal(number)
                go.set()
                run.saver.wait()


def test_signals_to_all_processes_do_not_cost_the_last_checkpoint(ranks: RankGroups, tmp_path: Path):
    """Finds a process that ends at a signal by which its rank saves, even before Python has started in it."""
    ranks.run(1, save_despite_signals, tmp_path)
    assert [values(tmp_path, step) for step in (2, 3)] == [{2.0}, {3.0}]
