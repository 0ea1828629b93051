"""What Ray's errors say, in a line: they carry whole tracebacks of other processes."""


def first_line(error: BaseException) -> str:
    """The first line with words; of an actor's death that is the reason."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """The last line with words; of a task's traceback that is the exception."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
