"""What people see, with and without a terminal."""

import io

import pytest

from dist_lm.tracking import console
from dist_lm.tracking.console import Console
from dist_lm.tracking.live_state import GangFacts
from dist_lm.tracking.readable import duration


class Screen:
    """A console that prints into strings, and a clock that is set by hand."""

    def __init__(self, live: bool = False) -> None:
        self.now = 0.0
        self.output, self.errors = io.StringIO(), io.StringIO()
        self.console = Console(self.output, self.errors, live=live, clock=lambda: self.now)

    def lines(self) -> list[str]:
        return self.output.getvalue().splitlines()


def test_an_error_is_one_line_on_stderr() -> None:
    screen = Screen()
    screen.console.error("model.d_model=[7]:\n expected a multiple of 8 " + "x" * 200)
    assert screen.errors.getvalue() == "error: model.d_model=[7]: expected a multiple of 8 " + "x" * 200 + "\n"
    assert screen.output.getvalue() == ""


def test_plain_lines_come_every_ten_seconds_or_tenth_of_the_work() -> None:
    screen = Screen()
    with screen.console.counting("reading", unit="documents", total=100) as count:
        for item in range(100):
            screen.now += 0.1
            assert count.each(item) == item
    assert len(screen.lines()) == 10
    assert screen.lines()[-1] == "reading: 100 of 100 documents (10/s)"

    screen = Screen()
    with screen.console.counting("reading", unit="documents") as count:
        for _ in range(100):
            screen.now += 1
            count.advance(1000)
    assert 10 <= len(screen.lines()) <= 11
    assert screen.lines()[-1] == "reading: 100,000 documents (1,000/s)"


def test_tasks_show_bytes_a_second_and_the_time_left() -> None:
    """Would find results of an earlier command in the speed, and a time left that takes all tasks for equally large."""
    screen = Screen()
    sizes = {0: 50e6, 1: 100e6, 2: 100e6, 3: 300e6}
    with screen.console.tasks("survey of code", sizes, done=[0]) as progress:
        progress.ended(0)
        for number in (2, 1, 3):
            screen.now += 10
            assert progress.ended(number) == number
    assert screen.lines() == [
        "survey of code: 2 of 4 tasks  10 MB/s  40 s left",
        "survey of code: 3 of 4 tasks  10 MB/s  30 s left",
        "survey of code: 4 of 4 tasks  16.67 MB/s",
    ]


def test_training_shows_loss_speed_and_time_left() -> None:
    screen = Screen()
    with screen.console.training("code", steps=100) as progress:
        for step in range(1, 51):
            screen.now += 2
            progress.update({"step": step, "time": 2.0 * step, "train/loss": 3.0, "perf/tokens_per_s": 12345.6})
    last = screen.lines()[-1]
    assert last == "code: step 50/100  loss 3.000  12,346 tokens/s  1:40 min left"


def test_a_plain_line_gives_the_step_of_an_older_value() -> None:
    screen = Screen()
    with screen.console.training("code", steps=100) as progress:
        progress.update({"step": 40, "time": 40.0, "train/loss": 3.0, "val/bits_per_byte": 2.5})
        progress.update({"step": 50, "time": 50.0, "train/loss": 2.0})
    assert screen.lines()[-1] == "code: step 50/100  loss 2.000  val 2.500 bits/byte @ 40  50 s left"


def test_what_an_earlier_attempt_wrote_is_neither_shown_nor_timed() -> None:
    screen = Screen()
    with screen.console.training("code", steps=100, since=1000.0) as progress:
        for _ in range(2):  # the file is read again when lines are taken back
            for step in range(1, 51):
                progress.update({"step": step, "time": 2.0 * step, "train/loss": 3.0})
        assert screen.lines() == []
        for step in range(51, 76):
            screen.now += 4
            progress.update({"step": step, "time": 1000.0 + 4.0 * step, "train/loss": 2.0})
    assert screen.lines()[-1] == "code: step 75/100  loss 2.000  1:40 min left"


def test_a_restart_shows_no_line_twice_and_times_its_own_steps() -> None:
    screen = Screen()
    with screen.console.training("code", steps=100, since=1000.0) as progress:
        for step in range(1, 51):
            screen.now += 4
            progress.update({"step": step, "time": 1000.0 + 4.0 * step})
        shown = len(screen.lines())
        progress.state.start(GangFacts(("node",), 1, "cpu", "dp_shard=1", attempt=2), since=1500.0)
        assert progress.state.seconds_left() is None
        for step in range(1, 41):  # the file is cut at the checkpoint and read again
            screen.now += 4
            progress.update({"step": step, "time": 1000.0 + 4.0 * step})
        assert len(screen.lines()) == shown
        for step in range(41, 71):
            screen.now += 2
            progress.update({"step": step, "time": 1600.0 + 2.0 * step})
    assert screen.lines()[-1] == "code: step 70/100  1:00 min left"


def test_a_metric_that_is_not_finite_does_not_break_the_display() -> None:
    screen = Screen()
    with screen.console.training("code", steps=2) as progress:
        progress.update({"step": 1, "time": 1.0, "train/loss": None})
    assert screen.lines() == ["code: step 1/2"]


def test_work_that_fails_has_no_final_line() -> None:
    screen = Screen()
    with pytest.raises(ZeroDivisionError), screen.console.waiting("training 512 pieces"):
        raise ZeroDivisionError
    assert screen.lines() == []


def test_a_live_bar_ends_with_the_final_state() -> None:
    screen = Screen(live=True)
    with screen.console.counting("reading [bold]", unit="documents", total=3) as count:
        for item in range(3):
            count.each(item)
    assert "reading [bold]" in screen.output.getvalue()
    assert "3 documents" in screen.lines()[-1]


def test_tables_and_summaries_keep_the_text_as_it_is() -> None:
    screen = Screen()
    screen.console.table(
        "Plan", ("stage", "plan", ""), [("language", "build", "corpora [a]"), ("code", "continue", "step 10")]
    )
    screen.console.summary("Done", {"checkpoint": "work/runs/code/x", "bits per byte": "1.7"})
    text = screen.output.getvalue()
    for expected in ("corpora [a]", "continue", "work/runs/code/x", "bits per byte"):
        assert expected in text
    assert "\x1b[" not in text


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 185, 7385)] == ["0 s", "1:00 min", "3:05 min", "2:03:05 h"]


def test_generating_shows_prompts_speed_and_time_left() -> None:
    screen = Screen()
    with screen.console.generating("generate", prompts=100) as progress:
        progress.update(20, 5000)  # of an earlier command
        for prompts in range(21, 61):
            screen.now += 0.5
            progress.update(prompts, 5000 + (prompts - 20) * 100)
    assert screen.lines()[-1] == "generate: 60/100 prompts  200 tokens/s  20 s left"


def test_the_last_line_comes_once_when_output_is_no_terminal() -> None:
    for total, said, counted in ((100, 100, "100 of 100"), (100, 60, "60 of 100"), (None, 60, "60")):
        screen = Screen()
        with screen.console.counting("reading", unit="documents", total=total) as count:
            for _ in range(said // 20):
                screen.now += 20
                count.advance(20)
            screen.now += 1
        assert [line for line in screen.lines() if f" {counted} documents" in line] == screen.lines()[-1:]
        assert len(screen.lines()) == said // 20 - 1


@pytest.mark.parametrize("length", [10, 300])
def test_a_path_in_a_summary_stays_whole(length: int) -> None:
    screen, path = Screen(), "/work dir/" + "x" * length
    screen.console.summary("Done", {"samples": f"{path} (1 file)", "tokens": "7"})
    (line,) = [line for line in screen.lines() if "samples" in line]
    assert f"{path} (1 file)" in line
    assert ("│" in line) == (length == 10)


def test_long_columns_go_below_their_row_where_the_table_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "FILE_WIDTH", 60)
    rows = [("code", "done", "x" * 200, "runs/code"), ("tools", "there", "", "runs/tools")]
    screen = Screen()
    screen.console.table("stages", ("stage", "", "figures", "where"), rows, below=("figures", "where"))
    assert screen.lines()[:3] == ["stages", "stage", "code   done"]
    assert screen.lines()[3:] == [f"  {'x' * 200}", "  runs/code", "tools  there", "  runs/tools"]
    screen = Screen()
    screen.console.table("stages", ("stage", "where"), [("code", "runs/code")], below=("where",))
    assert screen.lines() == ["stages", "stage  where    ", "code   runs/code"]
