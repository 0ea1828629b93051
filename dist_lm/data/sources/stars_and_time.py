"""Reads from columns of a row which of several equal or nearly equal texts stays: the one with most stars, of these
the earliest.

A cell may be null, NaN or blank: then the text comes behind all that have a value. Any other cell that is no number of
stars, or no time, makes its row a broken one.
"""

import math
from datetime import UTC, date, datetime, time
from decimal import Decimal

from dist_lm.document import NO_STARS, NO_TIME

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class CellError(Exception):
    """A cell holds something else than its column should."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason  # one word, as in `Rejected`


def stars_of(cell: object, column: str) -> float:
    """Returns a number of stars; `NO_STARS` for an empty cell.

    Raises:
        CellError: it holds a negative or infinite number, or something else.
    """
    cell = _text_of_bytes(cell)
    if _is_empty(cell):
        return NO_STARS
    try:
        stars = _number(cell)
        if 0 <= stars < math.inf:
            return stars
    except (TypeError, ValueError, OverflowError):
        pass  # refused below, as a number out of range is
    raise CellError("bad_stars", f"{column} holds {_in_brief(cell)}, expected a number of stars, 0 or more")


def time_of(cell: object, column: str) -> float:
    """Returns a time in seconds since 1970; `NO_TIME` for an empty cell.

    A number counts as seconds since 1970, a time without zone as UTC, and a day as its beginning.

    Raises:
        CellError: it holds an infinite number, or no time.
    """
    cell = _text_of_bytes(cell)
    if _is_empty(cell):
        return NO_TIME
    for seconds_of in (_number, _seconds):
        try:
            seconds = seconds_of(cell)
            if math.isfinite(seconds):
                return seconds
        except (TypeError, ValueError, OverflowError):
            continue  # a text may be a number or a date
    raise CellError("bad_time", f"{column} holds {_in_brief(cell)}, expected a date of ISO 8601 or seconds since 1970")


def _text_of_bytes(cell: object) -> object:
    """Returns the text of bytes, which parquet files and members of tars hold, and any other cell as it is."""
    return cell.decode(errors="replace") if isinstance(cell, bytes) else cell


def _is_empty(cell: object) -> bool:
    # NaN alone is not equal to itself. pandas writes it in place of a missing integer.
    return cell is None or cell != cell or (isinstance(cell, str) and cell.strip().lower() in ("", "nan"))


def _number(cell: object) -> float:
    """Raises TypeError, ValueError or OverflowError if the cell is no number."""
    # A truth value is an integer in Python.
    if isinstance(cell, bool) or not isinstance(cell, int | float | str | Decimal):
        raise TypeError
    return float(cell)


def _seconds(cell: object) -> float:
    """Raises TypeError, ValueError or OverflowError if the cell is no date."""
    moment = datetime.fromisoformat(cell.strip()) if isinstance(cell, str) else cell
    if isinstance(moment, date) and not isinstance(moment, datetime):
        moment = datetime.combine(moment, time())
    if not isinstance(moment, datetime):
        raise TypeError
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - EPOCH).total_seconds()


def _in_brief(cell: object) -> str:
    words = repr(cell)
    return words if len(words) <= 40 else f"{words[:40]}..."
