"""People are told of what a run's metrics, or their absence, give cause for: once, not at every step."""

from dist_lm.tracking.alerts import FIRST_LINE_S, QUIET_S, AlertWatch, failed, finished


def line(step: int, **metrics: float | None) -> dict:
    return {"step": step} | {f"train/{name}": value for name, value in metrics.items()}


def titles(watch: AlertWatch, lines: list[dict], start: float = 0.0, every: float = 1.0) -> list[str]:
    return [alert.title for number, one in enumerate(lines) for alert in watch.line(one, start + every * number)]


def test_a_loss_spike_and_a_skipped_step_are_told_when_their_counters_rise() -> None:
    counts = [(0, 0), (0, 0), (1, 0), (1, 0), (1, 1), (1, 1)]
    lines = [line(n, loss_spikes=spikes, skipped_steps=skipped) for n, (spikes, skipped) in enumerate(counts)]
    assert titles(AlertWatch("run", 0.0), lines) == ["run: loss spike", "run: NaN"]


def test_a_counter_that_starts_high_or_goes_back_says_nothing() -> None:
    lines = [line(n, loss_spikes=count) for n, count in enumerate((7, 7, 3, 3))]
    assert titles(AlertWatch("run", 0.0), lines) == []


def test_a_loss_that_is_not_finite_is_told_once_a_while() -> None:
    lines = [line(n, loss=None if n > 2 else 1.0) for n in range(100)]
    assert titles(AlertWatch("run", 0.0), lines) == ["run: NaN"]
    assert len(titles(AlertWatch("run", 0.0), lines, every=QUIET_S / 10)) == 10


def test_a_stall_is_told_once_and_again_after_a_step() -> None:
    watch = AlertWatch("run", 0.0)
    titles(watch, [line(n, loss=1.0) for n in range(10)])
    assert watch.tick(QUIET_S) == []
    assert [alert.title for now in range(400, 500) for alert in watch.tick(now)] == ["run: stalled"]
    watch.line(line(11, loss=1.0), 500.0)
    assert watch.tick(500 + QUIET_S) == []
    assert [alert.title for alert in watch.tick(510 + QUIET_S)] == ["run: stalled"]


def test_patience_grows_with_the_step_and_the_start_has_its_own() -> None:
    slow = AlertWatch("run", 0.0)
    assert slow.tick(FIRST_LINE_S - 1) == []
    assert [alert.title for alert in slow.tick(FIRST_LINE_S + 1)] == ["run: stalled"]
    titles(slow, [line(n, loss=1.0) for n in range(10)], every=100.0)
    assert slow.tick(900 + 1999) == []
    assert slow.tick(900 + 2001) != []


def test_another_attempt_has_the_patience_of_a_start_and_the_interval_that_was_learned() -> None:
    watch = AlertWatch("run", 0.0)
    titles(watch, [line(n, loss=1.0) for n in range(2)], every=100.0)
    assert watch.tick(4000.0) != []
    watch.attempt(5000.0)
    assert watch.tick(5000.0 + FIRST_LINE_S - 1) == []
    assert watch.tick(5000.0 + FIRST_LINE_S + 1) != []  # a stall of this attempt is told again
    watch.line(line(9, loss=1.0), 7000.0)  # its distance to the line before is no interval
    assert watch.tick(7000.0 + 1999) == []
    assert watch.tick(7000.0 + 2001) != []


def test_the_end_is_told() -> None:
    assert finished("run", {"val/loss": 1.23456, "perf/mfu": 0.4}).text == "val/loss 1.235"
    assert (failed("run", "rank 3: boom", again=True).level, failed("run", "boom", again=False).level) == (
        "WARN",
        "ERROR",
    )
