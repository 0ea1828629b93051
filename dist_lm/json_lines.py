"""Files of JSON lines: an object a line, and a line ends at a line feed alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def json_lines(path: Path) -> Iterator[Any]:
    """The value of every line that is not blank.

    `str.splitlines` would cut inside a text that holds U+2028, U+2029 or U+0085, which JSON leaves as they are.

    Raises:
        ValueError: a line is no JSON, or no UTF-8.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)
