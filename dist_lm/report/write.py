"""`python -m dist_lm report`: read, render, write."""

import time
from collections.abc import Sequence
from pathlib import Path

from dist_lm.errors import ArtefactError
from dist_lm.report.page import render
from dist_lm.report.read_work import read_facts, require_paths
from dist_lm.storage import durable

FILE = "report.html"


def write_report(paths: Sequence[Path], output: Path | None, run_id: str | None) -> tuple[Path, int]:
    """Write the report of `paths`.

    Args:
        output: the file; None: `report.html` in the one directory that `paths` names, or in the current one.
        run_id: of a work directory's pipeline; None: the newest.

    Returns:
        The file and its size in bytes.

    Raises:
        ArtefactError: there is nothing to report on, or the file cannot lie where it should.
    """
    require_paths(paths, run_id)
    output = output or (paths[0] / FILE if len(paths) == 1 else Path(FILE))
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ArtefactError(f"--output {output}: give a file in a directory that is there, such as {FILE}")
    page = render(read_facts(paths, run_id), made=time.strftime("%Y-%m-%d %H:%M"))
    durable.write_text(output, page)
    return output, output.stat().st_size
