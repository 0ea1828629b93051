"""Arguments and options that several verbs have."""

from pathlib import Path
from typing import Annotated

import typer

CheckpointPath = Annotated[
    Path, typer.Argument(help="A checkpoint, or a folder of checkpoints or a run (LATEST is used).")
]

TokenizerPath = Annotated[
    Path | None,
    typer.Option(
        help="Tokenizer: a file, or a folder such as work/tokenizer. Default: that of the run's work directory."
    ),
]
DeviceName = Annotated[str, typer.Option(help="auto (a GPU, if there is one), cpu or cuda.")]
