"""The folder that an export writes: it is new, empty, or holds an earlier export alone. Imports no torch."""

from pathlib import Path

from dist_lm.errors import ArtefactError
from dist_lm.stages.exporting.model_card import RECORD
from dist_lm.storage import durable


def refuse_files_of_others(folder: Path) -> None:
    """Refuses a folder with files that no export wrote; a missing or empty one passes.

    Raises:
        ArtefactError: names the first such file; or the folder is a file, or its record is no JSON.
        OSError: a file cannot be read.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ArtefactError(f"{folder} is a file: name a folder")
    record = durable.read_json(folder / RECORD)
    exported_names = {RECORD, *record.get("files", {})}
    if foreign_names := sorted({path.name for path in folder.iterdir()} - exported_names):
        raise ArtefactError(f"{folder} holds {foreign_names[0]}, which no export wrote: name a new or empty folder")
