"""`python -m dist_lm checkpoint inspect PATH`: a summary of a checkpoint."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_lm.tracking.readable import gib, three_decimals
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import StoredTensor, stored_tensors


def print_checkpoint(path: Path, console: Console) -> None:
    """Prints step, model, tensors and files of the checkpoint at `path`; reads headers, not tensors.

    Raises:
        ArtefactError: there is no checkpoint, a file is missing, truncated or foreign, or one cannot be read; or the
            state has changed.
    """
    directory = files.find_checkpoint(path)
    files.verify(directory, contents=False)
    files.verify_state(directory)
    state, model = files.read_state(directory)
    tensors = stored_tensors(directory)

    console.print(Text(f"Checkpoint {directory}", style="bold"))
    facts = Table(show_header=False, box=None)
    facts.add_row("step", f"{state.step:,}")
    facts.add_row("trained on", f"{state.tokens:,} tokens, {state.position:,} sequences")
    if state.best_val_loss is not None:
        facts.add_row("best val/loss", f"{three_decimals(state.best_val_loss)}, step {state.best_step:,}")
    facts.add_row("pointed at by", ", ".join(pointers(directory)) or "nothing")
    for name in (files.LATEST, files.BEST):
        if files.names_nothing(directory.parent, name):
            facts.add_row(name, "is damaged: it names no checkpoint that is there")
    facts.add_row("model", ", ".join(f"{key}={setting}" for key, setting in model.items()))
    n_parameters = sum(tensor.elements for tensor in tensors.values() if tensor.name.startswith(files.MODEL))
    facts.add_row("parameters", f"{n_parameters:,}")

    console.print(facts)
    console.print(_tensor_table(tensors.values()))
    console.print(_file_table(directory, tensors.values()))


def pointers(directory: Path) -> list[str]:
    """Lists the pointers, LATEST and BEST, that name this checkpoint."""
    names = (files.LATEST, files.BEST)
    return [name for name in names if files.read_pointer(directory.parent, name) == directory]


def group_of(name: str) -> str:
    """Returns the row of a tensor in the table: one row for all layers, one for each kind of optimizer tensor."""
    if prefix := re.match(rf"(\w+\.)?{re.escape(files.OPTIMIZER)}", name):
        return f"{prefix.group()}*.{name.rpartition('.')[2]}"
    return re.sub(r"\.\d+\.", ".*.", name)


def _tensor_table(tensors: Iterable[StoredTensor]) -> Table:
    """Returns the table of tensors: a row for each kind, all layers together, with count, shape, dtype, elements and
    size."""
    # Layers differ in the number in their names only, so one row stands for all of them.
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        groups.setdefault(group_of(tensor.name), []).append(tensor)

    table = Table(title="Tensors", title_justify="left")
    table.add_column("tensors", overflow="fold", no_wrap=True)  # a truncated name would be ambiguous
    table.add_column("count", justify="right")
    for name in ("shape", "dtype"):
        table.add_column(name)
    table.add_column("elements", justify="right")
    table.add_column("size", justify="right")

    for name, group in groups.items():
        shapes = {" x ".join(map(str, tensor.shape)) or "scalar" for tensor in group}
        shape = f"{len(shapes)} shapes"
        if len(shapes) == 1:
            (shape,) = shapes
        table.add_row(
            Text(name),
            f"{len(group):,}",
            shape,
            ", ".join(sorted({tensor.dtype for tensor in group})),
            f"{sum(tensor.elements for tensor in group):,}",
            gib(sum(tensor.bytes for tensor in group)),
        )
    return table


def _file_table(directory: Path, tensors: Iterable[StoredTensor]) -> Table:
    """Returns the table of all files below `directory`, by name, with the number of parts of tensors in each (empty:
    none) and its size."""
    parts = Counter(part.file.name for tensor in tensors for part in tensor.parts)
    table = Table("file", title="Files", title_justify="left")
    table.add_column("parts of tensors", justify="right")
    table.add_column("size", justify="right")
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = str(file.relative_to(directory))
        table.add_row(Text(name), f"{parts[name]:,}" if parts[name] else "", gib(file.stat().st_size))
    return table
