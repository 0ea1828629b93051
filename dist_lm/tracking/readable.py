"""Numbers for people."""

from dist_lm.tracking.progress import duration


def gib(size: float) -> str:
    """Bytes: `56 B`, `2.0 KiB`, `8.8 MiB`, `2.53 GiB`."""
    if size < 2**20:
        return f"{size / 2**10:.1f} KiB" if size >= 2**10 else f"{size:.0f} B"
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def readable_count(count: int) -> str:
    """1,087,000,000 -> `1.09 B`."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`, `1,000 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def span(seconds: float) -> str:
    """`0.288 ms`, `46.2 ms`, `1.63 s`, `29:50 min`, `1:24:03 h`."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else duration(seconds)


def three_digits(value: float) -> str:
    """`0.0772`, `4.42`, `2,040`: never with an exponent that a person has to count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
