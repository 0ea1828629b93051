"""Folders that `datasets` wrote with `save_to_disk`: `state.json` names the files that are the data set.

Later calls of `map` and `filter` leave files `cache-*.arrow` beside them, which hold other or the same rows again.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from dist_lm.errors import ArtefactError

STATE = "state.json"
ARROW = ".arrow"
LONGEST = 16 << 20  # bytes of state.json


@dataclass(frozen=True, slots=True)
class SavedDataSet:
    """The content of `state.json`."""

    files: frozenset[str]  # names in the folder
    split: str  # such as train, or train[:10%]; empty: not told


def saved_data_set(folder: str) -> SavedDataSet | None:
    """Returns the data set that was saved into a folder; None if its `state.json` is of something else.

    Raises:
        ArtefactError: a file of the data set is missing, or an older release saved it as a selection of rows.
        OSError: `state.json` cannot be read.
    """
    path = Path(folder) / STATE
    with path.open("rb") as file:
        content = file.read(LONGEST + 1)
    try:
        state = json.loads(content)
        names = [file["filename"] for file in state["_data_files"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None  # any program may write a file of this name
    if not all(isinstance(name, str) for name in names):
        return None

    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ArtefactError(
            f"{path}: the data set is a selection of the rows in its files, which an older release of datasets saved: "
            "load it there and save it again after flatten_indices()"
        )
    for name in names:
        if not (Path(folder) / name).is_file():
            raise ArtefactError(f"{path}: names the file {name}, which is missing: copy the folder again")
    split = state.get("_split")
    return SavedDataSet(frozenset(names), split if isinstance(split, str) else "")
