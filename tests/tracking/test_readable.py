"""Numbers for people."""

from dist_lm.tracking.readable import gib, readable_count, span, three_digits


def test_numbers_are_readable() -> None:
    assert [readable_count(n) for n in (999, 2_548_160, 1_086_108_800)] == ["999", "2.55 M", "1.09 B"]
    assert [gib(n) for n in (56, 2048, 9_253_632, 2**31)] == ["56 B", "2.0 KiB", "8.8 MiB", "2.00 GiB"]
    times = (0.000288, 0.0462, 1.63, 1790, 28200)
    assert [span(seconds) for seconds in times] == ["0.288 ms", "46.2 ms", "1.63 s", "29:50 min", "7:50:00 h"]
    assert [three_digits(x) for x in (0.0772, 4.42, 127.4, 2040.3)] == ["0.0772", "4.42", "127", "2,040"]
