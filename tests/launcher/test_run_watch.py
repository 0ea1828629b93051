"""wandb is handed all that belongs to a run: metrics, samples, checkpoints, inputs, usage of nodes, its end."""

import io
import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_lm.cluster.events import GangFailure
from dist_lm.cluster.heartbeat import Pulse
from dist_lm.cluster.node_facts import NodeUsage
from dist_lm.launcher import watch
from dist_lm.launcher.watch import RunWatch, watching
from dist_lm.prepare.compose import compose_config
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.alerts import QUIET_S, Alert
from dist_lm.tracking.console import Console
from dist_lm.tracking.live_state import GangFacts
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training.heartbeat import Phase

USAGE = {"n1": NodeUsage(50.0, 25.0, 4.0)}


class Told:
    """What wandb was handed."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.names: list[str] = []
        self.links: list[tuple[str, list[str], list[str]]] = []
        self.alerts: list[str] = []
        self.tables: list[tuple[str, int]] = []
        self.outcome = ""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.steps.append(step)

    def log_at_newest_step(self, values: Mapping[str, float]) -> None:
        self.names += values

    def samples(self, path: Path, step: int) -> None:
        self.tables.append((path.name, step))

    def link(self, key: str, name: str, kind: str, files: list[Path], metadata: dict, aliases: tuple = ()) -> None:
        self.links.append((name, [file.name for file in files], list(aliases)))

    def alert(self, alert: Alert) -> None:
        self.alerts.append(alert.title)

    def finish(self, outcome: str) -> None:
        self.outcome = outcome


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setattr(watch.WandbRun, "start", lambda *_, **__: told)
    return told


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "code" / "first")
    run.create()
    for path in (run.work.tokenizer_model, run.work.corpus_manifest("code")):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    return run


def show(run: RunDirectory) -> AbstractContextManager[RunWatch]:
    config = compose_config(["stage=code", "stage.corpus=code", "run_id=first", f"work_dir={run.work.path}"])
    return watching(config, run, Console(output=io.StringIO(), errors=io.StringIO()))


def write(run: RunDirectory, *lines: dict[str, Any]) -> None:
    with run.metrics.open("a") as file:
        file.writelines(json.dumps({"time": time.time()} | line) + "\n" for line in lines)


def test_what_belongs_to_a_run_is_handed_on_once(run: RunDirectory, told: Told) -> None:
    checkpoint = run.checkpoints / "step_00000002"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    with show(run) as shown:
        write(run, {"step": 1, "train/skipped_steps": 0}, {"step": 2, "train/skipped_steps": 1})
        (run.checkpoints / "LATEST").write_text("step_00000002\n")
        (run.samples / "step_00000002.jsonl").write_text("{}\n")
        for _ in range(3):
            shown.look(USAGE)
        shown.restarts(GangFailure(0, 0, "x", "boom", run.logs))
        run.result.write_text("{}")
    assert told.steps == [1, 2]
    assert told.names == ["system/cpu_percent_n1", "system/memory_percent_n1", "system/memory_gib_n1"]
    assert told.tables == [("step_00000002.jsonl", 2)]
    assert told.links == [
        ("tokenizer", ["tokenizer.model"], []),
        ("corpus-code", ["manifest.json"], []),
        ("checkpoint-code-first", ["manifest.json"], ["latest"]),
    ]
    assert told.alerts == ["code/first: NaN", "code/first restarts", "code/first finished"]
    assert told.outcome == "finished"


def test_a_run_that_was_stopped_is_neither_failed_nor_finished(run: RunDirectory, told: Told) -> None:
    with show(run):
        pass
    assert (told.outcome, told.alerts) == ("stopped", [])


def test_a_failure_is_one(run: RunDirectory, told: Told) -> None:
    with pytest.raises(RuntimeError), show(run):
        raise RuntimeError("boom")
    assert (told.outcome, told.alerts) == ("failed", ["code/first failed"])


def test_a_start_of_more_than_a_minute_says_what_each_rank_does(
    run: RunDirectory, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch stood 402 s in 'starting' with both ranks busy, and said no more."""
    now = [0.0]
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    output = io.StringIO()
    config = compose_config(["stage=code", "stage.corpus=code", "run_id=first", f"work_dir={run.work.path}"])
    with watching(config, run, Console(output=output, errors=io.StringIO())) as shown:
        shown.attempt(GangFacts(("n1",), 3, "cpu", "dp=3"))
        for second in range(200):
            now[0] = float(second)
            if second >= 70:
                # Rank 0 beats again and again in its evaluation.
                pulses = [
                    (0, Phase.EVALUATING, 0.5),
                    (1, Phase.STARTING, float(second)),
                    (2, Phase.LOADING, second - 65),
                ]
                shown.heard([Pulse(rank, phase, 0, age_s, 0.0) for rank, phase, age_s in pulses])
            shown.look({})
            if second == 150:
                write(run, {"step": 1, "train/skipped_steps": 0})
    first, second_line = [line for line in output.getvalue().splitlines() if line.startswith("no step after")]
    assert first.startswith("no step after 1:00 min: no rank has reported yet")
    rank_1 = "rank 1 starting (importing packages) for 2:00 min"
    doing = f"rank 0 evaluating for 50 s, {rank_1}, rank 2 loading the model for 55 s"
    assert second_line == f"no step after 2:00 min: {doing}; logs: {run.logs}"


@pytest.mark.parametrize("is_first", [True, False])
def test_log_probabilities_that_take_minutes_are_told_with_their_share(
    run: RunDirectory, told: Told, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    """Stage preference was silent for four minutes before its first step, and stage rlhf inside each step."""
    now = [0.0]
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    output = io.StringIO()
    config = compose_config(["stage=code", "stage.corpus=code", "run_id=first", f"work_dir={run.work.path}"])
    with watching(config, run, Console(output=output, errors=io.StringIO())) as shown:
        shown.attempt(GangFacts(("n1",), 2, "cpu", "dp=2"))
        if not is_first:
            write(run, {"step": 1, "train/skipped_steps": 0})
        for second in range(250):
            now[0] = float(second)
            shares = (second / 500, second / 250)
            pulses = [Pulse(rank, Phase.SCORING, 1, 0.0, 0.0, share_done=share) for rank, share in enumerate(shares)]
            shown.heard(pulses)
            shown.look({})
        lines = [line for line in output.getvalue().splitlines() if "computing log-probabilities" in line]
        assert len(lines) == 4
        begin = "no step after" if is_first else "no further step for"
        assert lines[1].startswith(f"{begin} 2:00 min: 2 ranks computing log-probabilities (36 %) for 2:00 min; logs:")
        assert [rank.doing for rank in shown._progress.state.ranks] == ["computing log-probabilities (75 %)"] * 2


def skipped(*counts: int) -> list[dict[str, Any]]:
    return [{"step": step, "train/skipped_steps": count} for step, count in enumerate(counts, start=1)]


def test_lines_that_are_read_again_give_no_alert_and_teach_no_interval(
    run: RunDirectory, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    gang, now = GangFacts(("n1",), 1, "cpu", "dp=1"), [0.0]
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    write(run, *skipped(0, 1, 1))  # by an earlier launch
    with show(run) as shown:
        shown.attempt(gang)
        shown.look({})
        now[0] += 2 * QUIET_S  # the first step compiles
        shown.look({})
        assert told.alerts == []
        write(run, {"step": 4, "train/skipped_steps": 1}, {"step": 5, "train/skipped_steps": 2})
        shown.look({})
        assert told.alerts == ["code/first: NaN"]
        now[0] += 2 * QUIET_S  # else a repeated alert would be held back
        shown.attempt(gang)
        with MetricsWriter(run.metrics) as writer:
            writer.truncate_after(5)  # as a resumed run does
        shown.look({})
        now[0] += 2 * QUIET_S
        shown.look({})
    assert told.alerts == ["code/first: NaN"]
    assert told.steps == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]  # wandb knows what it has
