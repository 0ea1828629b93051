"""Numbers for people."""

from dist_lm.tracking.readable import change, four_digits, gib, percent, readable_count, span, three_decimals


def test_numbers_are_readable() -> None:
    assert [readable_count(n) for n in (999, 2_548_160, 1_086_108_800)] == ["999", "2.55 M", "1.09 B"]
    assert [gib(n) for n in (56, 2048, 9_253_632, 2**31)] == ["56 B", "2.0 KiB", "8.8 MiB", "2.00 GiB"]
    times = (0.000288, 0.0462, 1.63, 1790, 28200)
    assert [span(seconds) for seconds in times] == ["0.288 ms", "46.2 ms", "1.63 s", "29:50 min", "7:50:00 h"]
    shown = ["0.0772", "4.42", "127", "2,040", "1.23 M", "-2.50 M", "9.88e-04", "1.20e-05", "0", "-0.5"]
    values = (0.0772, 4.42, 127.4, 2040.3, 1_234_567.0, -2.5e6, 0.000988, 0.000012, 0.0, -0.5)
    assert [four_digits(value) for value in values] == shown
    assert [three_decimals(value) for value in (2.0, 0.0123)] == ["2.000", "0.012"]
    assert [percent(share) for share in (0, 0.1234, 0.75, 1)] == ["0%", "12.3%", "75%", "100%"]
    assert [change(ratio) for ratio in (1, 1.019, 0.88)] == ["+0%", "+1.9%", "-12%"]
